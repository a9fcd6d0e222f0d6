"""Reply to requests with a model behind an OpenAI-compatible endpoint on this machine (vLLM, llama.cpp, firth's own server).

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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from firth.evaluate.prompting.requests import GenerateReply, GenerateRequest, Reply, Request, ScoreReply, ScoreRequest
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import UserError

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
