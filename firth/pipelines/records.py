"""Read prompts and answers from records, ask a model, and write records: what the stages that make data share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from firth.corpora.readers import records
from firth.data.conversations import prompt_of
from firth.evaluate.prompting.endpoint import PREFIX, Endpoint
from firth.evaluate.prompting.local_model import LocalModel
from firth.evaluate.prompting.prompts import without_lone_surrogates
from firth.evaluate.prompting.requests import (
    GenerateReply,
    GenerateRequest,
    Reply,
    ReplyCache,
    Request,
    Responder,
    ScoreReply,
    ScoreRequest,
)
from firth.evaluate.prompting.runner import ask_model
from firth.io.atomic import write_text
from firth.io.cache import cache
from firth.pipelines.stage import Weights
from firth.runs.loaded_model import fast_weights
from firth.types import LOGGER, UserError


@dataclass(frozen=True)
class PromptRecord:
    """A record with a prompt.

    Args:
        location: Its file and line.
        prompt: The prompt as text: the message of the user.
        fields: The record.
    """

    location: str
    prompt: str
    fields: Mapping[str, Any]


def read_prompts(paths: Sequence[str], limit: int = 0) -> list[PromptRecord]:
    """Return the records of some files that have a prompt of one user message.

    Args:
        paths: Files, directories or globs of JSONL, Parquet or CSV.
        limit: Most records; 0 for all.

    Raises:
        UserError: A record has no prompt, or one of several messages, which the stages that write data do not support; or a text
            that no file can be written with.
    """
    found: list[PromptRecord] = []
    for location, record in records(paths):
        if without_lone_surrogates(record) != record:
            raise UserError(
                f"{location}: a text has half a character, such as \\ud83d without its other half: write the whole character, "
                "or leave the record out"
            )
        try:
            messages = prompt_of(record)
        except UserError as error:
            raise UserError(f"{location}: {error}") from error
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise UserError(
                f"{location}: the prompt must be one message of the user, and this one has {len(messages)} messages"
            )
        found.append(PromptRecord(location, messages[0]["content"], record))
        if limit and len(found) == limit:
            break
    if not found:
        raise UserError(f"{', '.join(paths)}: there is no record")
    return found


def open_responder(model: str, weights: Weights = "", scored: bool = False) -> Responder:
    """Return a model that replies to requests.

    Args:
        model: A run, a model directory, an adapter, a GGUF file, or `openai:URL`.
        weights: Data type of the weights, but not of an endpoint's; "" takes bf16 where it is faster.
        scored: Whether log-probabilities will be requested, which not every endpoint offers.

    Raises:
        UserError: The model cannot be read, or the endpoint offers no log-probabilities.
    """
    if not model.startswith(PREFIX):
        return LocalModel.open(Path(model), weights or fast_weights)
    endpoint = Endpoint(model)
    if scored:
        endpoint.check_scores()
    return endpoint


class Asker:
    """A model that replies in batches; its replies are kept, so that an interrupted stage resumes.

    Args:
        model: As of `open_responder`.
        weights: Likewise.
        scored: Likewise.
    """

    def __init__(self, model: str, weights: Weights = "", scored: bool = False) -> None:
        self.responder = open_responder(model, weights, scored)
        self._replies = ReplyCache(cache() / "replies", self.responder.digest)

    def write(self, requests: Sequence[GenerateRequest], locations: Sequence[str]) -> list[GenerateReply]:
        """Return the texts that the model writes, in order; see `_replies_to`."""
        room = self.responder.context - 1
        for request, location in zip(requests, locations, strict=True):
            length = self.responder.count_tokens(request.prompt, request.chat)
            if length > room:
                raise UserError(
                    f"{location}: the prompt has {length:,} tokens, and {self.responder.name} reads {room:,} before the "
                    "answer: leave the record out"
                )
        return cast(list[GenerateReply], self._replies_to(requests, locations))

    def score(self, requests: Sequence[ScoreRequest], locations: Sequence[str]) -> list[ScoreReply]:
        """Return the log-probabilities of continuations, in order; see `_replies_to`."""
        return cast(list[ScoreReply], self._replies_to(requests, locations))

    def _replies_to(self, requests: Sequence[Request], locations: Sequence[str]) -> list[Reply]:
        """Return the replies to some requests, in order.

        Args:
            requests: The requests.
            locations: File and line of the record of each, for messages.

        Raises:
            UserError: A prompt is too long for the model, or the model fails.
        """
        for request, location in zip(requests, locations, strict=True):
            try:
                self.responder.check([request])
            except UserError as error:
                raise UserError(f"{location}: {error}") from error
        try:
            replies = ask_model(
                requests,
                self.responder,
                self._replies,
                lambda done, total: LOGGER.info(f"{done:,} of {total:,} replies"),
            )
        finally:
            self._replies.close()
        return [replies[request] for request in requests]


def write_records(path: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON record per line."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found))
