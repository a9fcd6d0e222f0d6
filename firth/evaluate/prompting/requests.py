"""Requests to a model and its replies: the log-probability of a continuation, or a generated text.

Everything that an evaluation wants of a model is one of the two, so that requests of all tasks can be batched, cached and
sent to a model on another server (`firth.evaluate.prompting.responders`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TextIO

from firth.types import UserError


@dataclass(frozen=True)
class ScoreRequest:
    """Ask for log p(continuation | prompt).

    Args:
        prompt: Text before the continuation; may be empty. With `chat`, the user's message.
        continuation: The scored text, with the blank before it.
        chat: Whether the prompt is a message of the model's chat template, and the continuation its answer.
        begun: With `chat`, how the answer begins, before the continuation.
    """

    prompt: str
    continuation: str
    chat: bool = False
    begun: str = ""


@dataclass(frozen=True)
class GenerateRequest:
    """Ask for one continuation of a prompt.

    Args:
        prompt: The text to continue. With `chat`, the user's message.
        stop: Strings that end the answer and are not part of it.
        max_new_tokens: Most tokens of the answer.
        temperature: 0 for greedy decoding.
        top_p: Nucleus of sampling.
        seed: Seed of sampling; not used by greedy decoding.
        chat: Whether the prompt is a message of the model's chat template.
        begun: With `chat`, how the answer begins; it is not part of the reply.
    """

    prompt: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False
    begun: str = ""


@dataclass(frozen=True)
class ScoreReply:
    """Reply to a `ScoreRequest`.

    Args:
        logprobs: log p of each token of the continuation, in nats.
        greedy: Whether greedy decoding would have written the continuation.
    """

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def logprob(self) -> float:
        """Summed log-probability in nats."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class GenerateReply:
    """Reply to a `GenerateRequest`.

    Args:
        text: The answer without its stop string.
        finish: "stop", "length" or "context".
    """

    text: str
    finish: str


Request = ScoreRequest | GenerateRequest
Reply = ScoreReply | GenerateReply


class Responder(Protocol):
    """A model that replies to requests.

    Attributes:
        name: Name in tables: the directory or address.
        weights: Format of its weights (fp32, bf16, int8, ...); "" if unknown.
        context: Most tokens of a prompt with its continuation.
    """

    name: str
    weights: str
    context: int

    @property
    def digest(self) -> str:
        """Hash of the weights, the precision and all that changes replies."""

    def count_tokens(self, text: str, chat: bool = False) -> int:
        """Return the number of tokens of a text, as a message of the chat template with `chat`."""

    def check(self, requests: Sequence[Request]) -> None:
        """Raise a UserError if the model cannot reply to such requests; called for each item before the first reply."""

    def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) of each request, in the order in which they are computed."""


def sample_seed(seed: int, prompt: str, number: int) -> int:
    """Return the seed of a sampled answer, 31 bits: prompts and samples have independent random numbers."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed} {number} {prompt}".encode("utf-8", "surrogatepass")).digest()[:4]) >> 1
    )


def request_key(request: Request) -> str:
    """Return a hash of a request."""
    text = json.dumps([type(request).__name__, asdict(request)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ReplyCache:
    """Replies of one model in an append-only file, so that an interrupted evaluation resumes where it stopped.

    Args:
        directory: Directory of the cache; the file is named by the digest of the model.
        digest: Digest of the model.

    Raises:
        UserError: A line of the file other than the last is damaged.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        self.path = directory / f"{digest}.jsonl"
        self.replies: dict[str, Reply] = {}
        self._file: TextIO | None = None
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]  # a run that was killed may leave half a line
        if len(whole) < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                key, reply = json.loads(line)
                self.replies[key] = (
                    ScoreReply(tuple(reply["logprobs"]), reply["greedy"])
                    if "logprobs" in reply
                    else GenerateReply(**reply)
                )
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.path}:{number}: this line of the cache of replies is damaged: delete the file, and the "
                    "requests are sent again"
                ) from error

    def get(self, request: Request) -> Reply | None:
        """Return the reply to a request, or None."""
        return self.replies.get(request_key(request))

    def put(self, request: Request, reply: Reply) -> None:
        """Add a reply and write it to the file."""
        key = request_key(request)
        self.replies[key] = reply
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps([key, asdict(reply)]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
