"""Stages of a pipeline, and what they share: reading prompts, asking a model, writing records.

A stage is a frozen dataclass of settings that reads files or runs and writes into a directory of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from firth.corpora.readers import files, records
from firth.data.conversations import prompt_of
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
from firth.evaluate.prompting.responders import PREFIX, Endpoint, LocalModel
from firth.evaluate.prompting.runner import ask_model
from firth.fields import Validated
from firth.io import user_code
from firth.io.atomic import cache_directory, write_text
from firth.runs.loaded_model import fast_weights
from firth.types import LOGGER, UserError

Summary = Mapping[str, float | str]
"""Numbers of a finished stage: name -> value."""

Weights = Literal["", "fp32", "bf16", "int8"]
"""Data type of the weights of a model that replies, as `--weights` of `firth evaluate`."""


@dataclass(frozen=True)
class Stage(Validated):
    """Base class of stages.

    Attributes:
        main: The field that the value of the stage's kind sets: `sample: $sft` is `sample` with `model: $sft`.
        output: What `$NAME` of a later stage refers to: a file in the stage's directory, or "" for the directory.
    """

    main: ClassVar[str]
    output: ClassVar[str] = ""

    def check(self) -> None:
        """Raise UserError for settings that cannot work, before any stage runs."""

    def inputs(self) -> Iterator[Path]:
        """Yield the files that the stage reads, so that a finished stage is not skipped after one has changed."""
        for field in fields(self):
            yield from files_of(field.name, getattr(self, field.name))

    def run(self, directory: Path) -> Summary:
        """Run the stage, or resume it, and return numbers for the report.

        Args:
            directory: The directory of the stage; it may hold what an interrupted run left.
        """
        raise NotImplementedError


def files_of(name: str, value: Any) -> Iterator[Path]:
    """Yield the files that a setting names: records, weights of models, recipes, tasks and modules of a user's functions.

    Args:
        name: Name of the field.
        value: Its value; only texts and lists of texts name files.
    """
    texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    if name in ("data", "examples") and texts:
        yield from files(texts, tabled=True)
        return
    for text in map(str, texts):
        if "function" in name:
            yield from user_code.module_files(text)
        elif Path(text).is_dir():
            yield from sorted(Path(text).rglob("*.safetensors"))
        elif text and Path(text).is_file():
            yield Path(text)


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
        self._replies = ReplyCache(cache_directory() / "replies", self.responder.digest)

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
