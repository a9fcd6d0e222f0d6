"""Reply to requests with a model: a run, a model directory, an adapter or a GGUF file, or a model behind an endpoint.

The endpoint is OpenAI-compatible and on this machine (vLLM, llama.cpp, firth's own server):

    openai:http://127.0.0.1:8000/v1              the first model that the server lists
    openai:http://127.0.0.1:8000/v1#smollm2      a model by name

Generated answers come from `/completions` (`/chat/completions` with a chat template). Log-probabilities come from `/completions`
with `echo`, which repeats the prompt with the log-probability of each token; a server that does not offer it can only answer
tasks that generate. A request that fails is sent three times; replies so far are in the cache.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from firth.evaluate.perplexity import leading_bos
from firth.evaluate.prompting.requests import GenerateReply, GenerateRequest, Reply, Request, ScoreReply, ScoreRequest
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.scoring import (
    ScoredPair,
    TokenScores,
    check_gap_lengths,
    check_lengths,
    gap_slices,
    score_slices,
    scoring_mode,
)
from firth.model.model import LM
from firth.peft import adapter_files
from firth.tokenizer import chat
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import UserError

SCORING_VERSION = 1
"""Raised when scores or generated answers of the same model change, so that older cached replies are not used."""


class LocalModel:
    """A model on this machine that replies to requests (`firth.evaluate.prompting.requests.Responder`).

    Args:
        evaluated: The model.
        weights: Weight format (`firth.generate.engine.Engine`); None keeps the stored one.
        within_word: For masked models: whether the rest of a word is masked with each of its tokens (Kauf and Ivanova 2023).
            For T5: whether a gap is a word and not a token.
        batch_size: Most rows of a batch of generated answers.
        bos: Token that a decoder reads before every text (`firth.evaluate.perplexity.leading_bos`); None for none.

    Raises:
        UserError: The model has no LM head.
    """

    def __init__(
        self,
        evaluated: EvaluatedModel,
        weights: str | None = None,
        within_word: bool = False,
        batch_size: int = 32,
        bos: int | None = None,
    ) -> None:
        if not evaluated.model.has_lm_head:
            raise UserError(f"{evaluated.directory}: this model has no LM head, so it can neither score nor write text")
        self.name = str(evaluated.directory)
        self.evaluated, self.within_word = evaluated, within_word
        self.engine = Engine(evaluated.model, evaluated.tokenizer, weights=weights, batch_size=batch_size)
        self.model, self.tokenizer = self.engine.model, evaluated.tokenizer
        stored = str(evaluated.model.tokens.weight.dtype).removeprefix("torch.")
        self.weights = weights or {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(stored, stored)
        self.mode = scoring_mode(evaluated.model.config)
        names, vocab = evaluated.objective_names, evaluated.vocab
        self.fills_gaps = self.mode == "halves" and len(vocab.sentinels) > 1 and names in ([], ["span_corruption"])
        plain = self.mode == "causal" and not evaluated.model.config.attention.prefix_lm
        self.bos = bos if plain else None
        self.context = evaluated.model.context - (2 if self.mode == "masked" else 1)

    @staticmethod
    def open(
        directory: Path, weights: str | Callable[[LM], str | None] | None = None, within_word: bool = False
    ) -> LocalModel:
        """Load a model directory, a run, an adapter or a GGUF file.

        Args:
            directory: The directory or file.
            weights: Weight format, or a function that chooses it for the model; None keeps the stored one.
            within_word: For masked models: whether the rest of a word is masked with each of its tokens.
        """
        evaluated = load_evaluated_model(directory)
        weights = weights(evaluated.model) if callable(weights) else weights
        bos = leading_bos(evaluated.model_directory, evaluated.tokenizer)[0]
        return LocalModel(evaluated, weights, within_word, bos=bos)

    @cached_property
    def digest(self) -> str:
        """Hash of the model's files and of what changes its replies."""
        gaps = " gaps" if self.fills_gaps else ""
        settings = (
            f"{self.model.tokens.weight.dtype} {self.weights} {self.within_word}{gaps} {self.bos} {SCORING_VERSION}"
        )
        return model_digest(self.evaluated, settings)

    def count_tokens(self, text: str, chat: bool = False) -> int:
        """Return the number of tokens of a text, as a message of the chat template with `chat`."""
        return len(self._dialogue(text, "")) if chat else len(self.tokenizer.encode(text)) + (self.bos is not None)

    def check(self, requests: Sequence[Request]) -> None:
        """Raise a UserError if a scored text is longer than the context, or if a bidirectional model should write."""
        if self.mode == "masked" and any(isinstance(request, GenerateRequest) for request in requests):
            raise UserError(
                f"{self.name}: this model is bidirectional, so it cannot write an answer: use tasks that score"
            )
        scored = [request for request in requests if isinstance(request, ScoreRequest)]
        for check, in_gaps in ((check_lengths, False), (check_gap_lengths, True)):
            check(self.model, [self._pair(request) for request in scored if self._in_gaps(request) == in_gaps])

    def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) of each request, in the order in which they are computed."""
        scored = [(i, request) for i, request in enumerate(requests) if isinstance(request, ScoreRequest)]
        for k, _, scores in self.score([request for _, request in scored]):
            yield scored[k][0], ScoreReply(tuple(scores.logprobs.tolist()), scores.greedy)
        groups: dict[Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            if isinstance(request, GenerateRequest):
                groups.setdefault(_sampling(request), []).append(i)
        for sampling, index in groups.items():
            yield from self._generate(sampling, [(i, requests[i]) for i in index])  # type: ignore[misc]

    def score(self, requests: Sequence[ScoreRequest], top: int = 0) -> Iterator[tuple[int, ScoredPair, TokenScores]]:
        """Yield (index, tokens, scores) of each request, in the order in which they are computed.

        Args:
            requests: The texts.
            top: How many of the most likely tokens are returned for each token.
        """
        for found in self.score_slices(requests, top):
            yield from found

    def score_slices(
        self, requests: Sequence[ScoreRequest], top: int = 0, max_tokens: int = 0
    ) -> Iterator[list[tuple[int, ScoredPair, TokenScores]]]:
        """Yield what each forward pass completes, as in `firth.generate.scoring.score_slices`.

        Args:
            requests: The texts.
            top: How many of the most likely tokens are returned for each token.
            max_tokens: Most tokens of a forward pass that can be cut; 0 for the default.
        """
        for slices, in_gaps in ((score_slices, False), (gap_slices, True)):
            some = [(i, self._pair(one)) for i, one in enumerate(requests) if self._in_gaps(one) == in_gaps]
            pairs = [pair for _, pair in some]
            for scored in slices(self.model, self.evaluated.vocab, pairs, top, max_tokens) if some else ():
                yield [(*some[k], scores) for k, scores in scored]

    def _in_gaps(self, request: ScoreRequest) -> bool:
        """Return whether a text is scored word by word, each in a gap of the rest: no prompt, and a model that fills gaps."""
        return self.fills_gaps and not request.chat and not request.prompt.strip()

    def _generate(
        self, sampling: Sampling, requests: Sequence[tuple[int, GenerateRequest]]
    ) -> Iterator[tuple[int, GenerateReply]]:
        prompts = [self._prompt(request) for _, request in requests]
        order = sorted(range(len(requests)), key=lambda k: (-len(prompts[k]), prompts[k].tolist()))
        for first in range(0, len(order), self.engine.batch_size):
            some = order[first : first + self.engine.batch_size]
            seeds = [requests[k][1].seed for k in some]
            for k, answer in zip(
                some, self.engine.generate([prompts[k] for k in some], sampling, seeds=seeds), strict=True
            ):
                yield requests[k][0], GenerateReply(answer.text, answer.finish)

    def _prompt(self, request: GenerateRequest) -> np.ndarray:
        """Return the token ids of a prompt, (n,)."""
        if request.chat:
            return self._dialogue(request.prompt, request.begun)
        return self.framed(self.tokenizer.encode(request.prompt.rstrip(" ")))

    def framed(self, tokens: np.ndarray) -> np.ndarray:
        """Return a prompt with the special tokens of its family: bos before a decoder's, eos after an encoder-decoder's."""
        if self.mode == "halves":
            return np.append(tokens, self.evaluated.vocab.eos).astype(np.int32)
        return tokens if self.bos is None else np.concatenate(([self.bos], tokens)).astype(np.int32)

    def _dialogue(self, message: str, begun: str) -> np.ndarray:
        """Return the token ids of a user's message and the start of the answer."""
        tokens, _ = chat.encode(self.tokenizer, [{"role": "user", "content": message}], open=True)
        return np.concatenate((tokens, self.tokenizer.encode(begun))).astype(np.int32) if begun else tokens

    def _pair(self, request: ScoreRequest) -> ScoredPair:
        """Return a prompt and its continuation as token ids.

        Both are tokenized together and split after the prompt's own length, and blanks at the end of the prompt belong to
        the continuation, as in lm-evaluation-harness.
        """
        if request.chat:
            before = self._dialogue(request.prompt, request.begun)
            whole = self.tokenizer.encode(request.begun + request.continuation)
            after = whole[len(self.tokenizer.encode(request.begun)) :] if request.begun else whole
            return ScoredPair(before, after)
        prompt = request.prompt.rstrip()
        text = request.prompt[len(prompt) :] + request.continuation
        whole = self.tokenizer.encode(prompt + text)
        cut = len(self.tokenizer.encode(prompt)) if prompt else 0
        before, after = whole[:cut], whole[cut:]
        if self.mode == "masked" or self._in_gaps(request):
            return ScoredPair(before, after, self._word_starts(prompt, text, cut) if self.within_word else None)
        framed = self.framed(before)
        if not len(framed):  # a decoder without bos: transformers' models start with eos then
            start = self.evaluated.vocab.roles.get("bos", self.evaluated.vocab.roles.get("eos"))
            framed, after = (np.array([start], np.int32), after) if start is not None else (after[:1], after[1:])
        return ScoredPair(framed, after)

    def _word_starts(self, prompt: str, text: str, cut: int) -> np.ndarray:
        """Return whether each token of the continuation begins a word: a blank precedes it, or the text begins."""
        whole = prompt + text
        _, spans = self.tokenizer.spans(whole)
        starts = [whole[start : start + 1].isspace() or start == 0 or whole[start - 1].isspace() for start, _ in spans]
        return np.array(starts, bool)[cut:]


def _sampling(request: GenerateRequest) -> Sampling:
    return Sampling(
        max_new_tokens=request.max_new_tokens, temperature=request.temperature, top_p=request.top_p,
        stop_strings=tuple(stop for stop in request.stop if stop),
    )  # fmt: skip


def model_digest(evaluated: EvaluatedModel, settings: str) -> str:
    """Return a hash of the files of a model, of its tokenizer with the chat template, and of what changes its replies.

    The files of an adapter are its own and those of its base.
    """
    found = hashlib.sha256(repr((settings, evaluated.tokenizer.digest, evaluated.tokenizer.template)).encode())
    inner = evaluated.directory / "model"
    given = inner if inner.is_dir() else evaluated.directory
    base = [adapter_files.base_of(given)] if adapter_files.present(given) else []
    for place in dict.fromkeys([evaluated.model_directory, *base, *([given] if base else [])]):
        files = sorted(place.glob("*.safetensors")) + sorted(place.glob("*config*.json")) if place.is_dir() else [place]
        for file in files:
            with file.open("rb") as opened:
                found.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()[:32]


PREFIX = "openai:"
TIMEOUT_SECONDS = 600
TRIES = 3
CHARACTERS_PER_TOKEN = 3
"""Used to estimate the tokens of a prompt, since the endpoint's tokenizer is not known; it overestimates English."""
DEFAULT_CONTEXT = 2048
"""Tokens that are assumed where the server does not say how many it reads (`max_model_len`)."""


class Endpoint:
    """A model behind an OpenAI-compatible endpoint on this machine.

    Args:
        address: `openai:http://127.0.0.1:PORT/v1`, with `#NAME` for one of several models.

    Raises:
        UserError: The address is not on this machine, or no server replies.
    """

    def __init__(self, address: str) -> None:
        url, _, model = address.removeprefix(PREFIX).partition("#")
        self.name, self.url, self.weights = address, url.rstrip("/"), ""
        host = urlsplit(self.url).hostname or ""
        if not _is_local(host):
            raise UserError(
                f"{address}: the host {host!r} is not this machine: firth calls only endpoints on localhost"
            )
        models = self._send("models", None).get("data") or []
        names = [str(one.get("id")) for one in models if isinstance(one, dict)]
        if not names or (model and model not in names):
            raise UserError(f"{address}: the server has {', '.join(names) or 'no model'}, and not {model or 'any'}")
        self.model, self.scores = model or names[0], False
        entry: Mapping[str, Any] = models[names.index(self.model)]
        self.context = int(entry.get("max_model_len") or DEFAULT_CONTEXT)
        # Servers stamp their list with the time and random ids, which change from call to call.
        known = json.dumps([self.url, *(entry.get(name) for name in ("id", "root", "max_model_len"))])
        self.digest = hashlib.sha256(known.encode()).hexdigest()[:32]

    def count_tokens(self, text: str, chat: bool = False) -> int:
        """Return an estimate of the number of tokens of a text."""
        return -(-len(text.encode("utf-8", "surrogatepass")) // CHARACTERS_PER_TOKEN)

    def check(self, requests: Sequence[Request]) -> None:
        """Raise a UserError if requests need log-probabilities and the server returns none; it is tried once."""
        if any(isinstance(request, ScoreRequest) for request in requests):
            self.check_scores()
        if any(isinstance(request, ScoreRequest) and request.chat for request in requests):
            raise UserError(
                f"{self.name}: an endpoint gives no log-probabilities within a chat template: leave out --chat"
            )

    def check_scores(self) -> None:
        """Raise a UserError if the server returns no log-probabilities; it is tried once."""
        if not self.scores:
            self._score(ScoreRequest("a", " b"))
            self.scores = True

    def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) of each request, in order."""
        for i, request in enumerate(requests):
            yield i, self._score(request) if isinstance(request, ScoreRequest) else self._generate(request)

    def _generate(self, request: GenerateRequest) -> GenerateReply:
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": request.max_new_tokens, "temperature": request.temperature,
            "top_p": request.top_p, "seed": request.seed, "stop": list(request.stop)[:4],
        }  # fmt: skip
        if request.chat:
            messages = [{"role": "user", "content": request.prompt}]
            if request.begun:
                messages.append({"role": "assistant", "content": request.begun})
            choice = self._first(self._send("chat/completions", body | {"messages": messages}))
            text = str((choice.get("message") or {}).get("content") or "").removeprefix(request.begun)
        else:
            choice = self._first(self._send("completions", body | {"prompt": request.prompt.rstrip(" ")}))
            text = str(choice.get("text", ""))
        text = replace_lone_surrogates(text)
        ends = [at for stop in request.stop if stop and (at := text.find(stop)) >= 0]  # servers read at most four
        return GenerateReply(text[: min(ends)] if ends else text, str(choice.get("finish_reason") or "stop"))

    def _score(self, request: ScoreRequest) -> ScoreReply:
        prompt = request.prompt.rstrip()
        whole = request.prompt + request.continuation
        body = {"model": self.model, "prompt": whole, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        choice = self._first(self._send("completions", body))
        found = choice.get("logprobs") or {}
        offsets, logprobs = found.get("text_offset"), found.get("token_logprobs")
        tops = found.get("top_logprobs") or []
        if not offsets or not logprobs or not str(choice.get("text", "")).startswith(whole):
            raise UserError(
                f"{self.name}: this server returns no log-probabilities of the prompt (`echo` with `logprobs`): use a task that "
                "generates its answer, or evaluate the model's directory"
            )
        inside = [i for i, at in enumerate(offsets) if len(prompt) <= at < len(whole) and logprobs[i] is not None]
        if not inside:
            raise UserError(f"{self.name}: the server returned no log-probability of {request.continuation!r}")
        values = tuple(float(logprobs[i]) for i in inside)
        greedy = all(i < len(tops) and tops[i] and logprobs[i] >= max(tops[i].values()) - 1e-6 for i in inside)
        return ScoreReply(values, bool(greedy))

    def _first(self, reply: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UserError(f"{self.name}: the server's reply has no choices: {str(reply)[:200]}")
        first: Mapping[str, Any] = choices[0]
        return first

    def _send(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the reply to a request; it is sent again where the server does not answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as opened:
                    found = json.load(opened)
                break
            except urllib.error.HTTPError as error:
                text = error.read(500).decode("utf-8", "replace")
                if error.code < 500 or attempt == TRIES - 1:
                    raise UserError(f"{self.name}: the server refuses /{path} with {error.code}: {text}") from error
            except (OSError, ValueError) as error:
                if attempt == TRIES - 1:
                    raise UserError(
                        f"{self.name}: the server does not answer /{path} ({error}); replies so far are kept, so the same "
                        "command continues once it runs again"
                    ) from error
            time.sleep(attempt + 1)
        if not isinstance(found, dict):
            raise UserError(f"{self.name}: the reply to /{path} is not a JSON object")
        return found


def _is_local(host: str) -> bool:
    """Return whether a host name is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
