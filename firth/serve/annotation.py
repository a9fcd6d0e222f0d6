"""Collecting preferences in a browser: the routes of the page, and the thread that samples the answers.

POST /annotation/next      {"annotator"}                     the next prompt with its answers, without their runs
POST /annotation/judge     {"annotator", "item", "token", "ranks", "comment"}    ranks in the order shown; 1 is the best
POST /annotation/skip, /annotation/undo, /annotation/correct
GET  /annotation/statistics

`token` comes with the prompt and `event`, the last one of the annotator, with each response. A request that names others than there
are now gets 409, and nothing is recorded.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from firth.evaluate.prompting.requests import GenerateRequest, sample_seed
from firth.fields import AnswerCount, NonNegativeInt, PositiveFloat, Share, ShareAboveZero, TokenCount, Validated
from firth.pipelines.stage import Asker, PromptRecord, read_prompts
from firth.serve.config import ServeLimits
from firth.serve.operations import Places, parse
from firth.serve.pages import annotation_page
from firth.serve.preference_statistics import statistics
from firth.serve.preferences import JudgedItem, Preferences, StaleError, make_item
from firth.serve.responses import ApiError
from firth.serve.schemas import Strict
from firth.types import LOGGER, UserError

PROMPTS_AT_ONCE = 8
"""Prompts whose answers are sampled together; they are then ready to be judged."""

Annotator = Annotated[str, Field(min_length=1, max_length=60)]


@dataclass(frozen=True)
class AnnotationConfig(Validated, section="annotate"):
    """Configuration of what is judged.

    Args:
        runs: Runs, model directories, adapters, GGUF files or `openai:URL` that write the answers. None: the records have `samples`.
        prompts: Files of records with a prompt of one user message.
        answers: Answers to each prompt, of all runs in turn.
        twice: Share of the prompts that are given twice.
        temperature: Temperature of sampling.
        top_p: Nucleus of sampling.
        max_new_tokens: Most tokens of an answer.
        chat: Whether prompts are messages of the model's chat template.
        limit: Most prompts; 0 for all.
        seed: Seed of sampling and of the order in which answers are shown.
    """

    runs: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: AnswerCount = 4
    twice: Share = 0.1
    temperature: PositiveFloat = 1.0
    top_p: ShareAboveZero = 1.0
    max_new_tokens: TokenCount = 256
    chat: bool = True
    limit: NonNegativeInt = 0
    seed: NonNegativeInt = 0

    @property
    def sampling(self) -> str:
        """Names how the runs sample the answers; empty where no run does."""
        settings = (
            self.runs, self.answers, self.temperature, self.top_p, self.max_new_tokens, self.chat, self.seed,
        )  # fmt: skip
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16] if self.runs else ""


def sampled_items(
    config: AnnotationConfig, prompts: Sequence[PromptRecord], known: Mapping[str, list[JudgedItem]] | None = None
) -> Iterator[list[JudgedItem]]:
    """Yield items of some prompts at a time; a prompt whose answers are all equal has none.

    Args:
        config: What is judged.
        prompts: The prompts.
        known: Items of prompts whose answers the runs have written already.

    Raises:
        UserError: A prompt is too long, a run cannot be read, or a record has no samples where there are no runs.
    """
    known = (known or {}) if config.runs else {}
    askers: dict[str, Asker] = {}
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[start : start + PROMPTS_AT_ONCE]
        written = [_samples(prompt) if not config.runs else [] for prompt in some]
        for position, name in enumerate(config.runs):
            own = [
                (i, number)
                for i in range(len(some))
                for number in range(config.answers)
                if some[i].prompt not in known and (start + i + number) % len(config.runs) == position
            ]
            if not own:
                continue
            if name not in askers:
                askers[name] = Asker(name)
            requests = [
                GenerateRequest(
                    some[i].prompt, (), config.max_new_tokens, config.temperature, config.top_p,
                    sample_seed(config.seed, some[i].prompt, number), config.chat,
                )
                for i, number in own
            ]  # fmt: skip
            replies = askers[name].write(requests, [some[i].location for i, _ in own])
            for (i, _), reply in zip(own, replies, strict=True):
                written[i].append((name, reply.text))
        items: list[JudgedItem] = []
        for prompt, pairs in zip(some, written, strict=True):
            made = make_item(prompt.prompt, pairs)
            items += known.get(prompt.prompt, [made] if made is not None else [])
        yield items


def _samples(prompt: PromptRecord) -> list[tuple[str, str]]:
    """Return the samples of a record, whose runs are unknown."""
    found = prompt.fields.get("samples")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(text, str) for text in found):
        raise UserError(
            f"{prompt.location}: there is no list of answers in `samples`, which `firth pipeline sample` writes: name the runs that "
            "answer before the file of prompts"
        )
    return [("", text) for text in found]


class Collection:
    """Preferences that are being collected: the prompts, and the thread that samples answers to them.

    Args:
        config: What is judged.
        out: The file of preferences.

    Raises:
        UserError: A file or a run cannot be read, or the first prompts cannot be answered.
    """

    def __init__(self, config: AnnotationConfig, out: Path) -> None:
        self.prompts = read_prompts(config.prompts, config.limit)
        self.preferences = Preferences(out, config.twice, config.seed, config.sampling)
        self.error = ""
        self._sampled = sampled_items(config, self.prompts, self.preferences.known())
        try:
            self.preferences.add(next(self._sampled))
        except BaseException:
            self.preferences.close()
            raise
        self._thread = threading.Thread(target=self._sample, name="firth-annotate", daemon=True)

    def start(self) -> None:
        """Start sampling the answers to the other prompts."""
        self._thread.start()

    @property
    def sampling(self) -> bool:
        """Whether answers are still being sampled."""
        return self._thread.is_alive()

    def _sample(self) -> None:
        try:
            for items in self._sampled:
                self.preferences.add(items)
        except Exception as error:
            self.error = str(error) if isinstance(error, UserError) else f"sampling failed: {type(error).__name__}"
            LOGGER.warning(
                f"no further answers are sampled: {error}", exc_info=None if isinstance(error, UserError) else error
            )


class NextRequest(Strict):
    """Who wants the next prompt."""

    annotator: Annotator


class UndoRequest(NextRequest):
    """Who undoes, and what."""

    event: int = Field(description="The last event of the annotator, as the last response named it.")


class ItemRequest(NextRequest):
    """Who does something with a prompt."""

    item: str = Field(max_length=64)
    token: str = Field(max_length=64, description="The token that came with the prompt.")


class JudgeRequest(ItemRequest):
    """A ranking."""

    ranks: list[int] = Field(max_length=100)
    comment: str = Field("", max_length=2000)
    seconds: float = Field(0.0, ge=0)


class CorrectRequest(ItemRequest):
    """A corrected answer."""

    place: int = Field(description="The place of the answer in the order shown, from 0.")
    text: str = Field(max_length=100_000)


def annotation_routes(collection: Collection, limits: ServeLimits | None = None) -> list[BaseRoute]:
    """Return the page and its routes."""
    preferences = collection.preferences
    places = Places((limits or ServeLimits()).max_requests)

    def shown(item: JudgedItem | None, annotator: str) -> dict[str, Any]:
        """Return a prompt as an annotator sees it: the answers in their order, without their runs."""
        state = {"sampling": collection.sampling, "error": collection.error, "event": preferences.last(annotator)}
        if item is None:
            return state | {"item": None}
        found = preferences.shown(item, annotator)
        own = sum(one["annotator"] == annotator for one in preferences.judgments())
        about = {"item": item.id, "token": found.token, "prompt": item.prompt, "answers": found.answers, "judged": own}
        return state | about

    def take(body: NextRequest) -> dict[str, Any]:
        return shown(preferences.next(body.annotator), body.annotator)

    def judge(body: JudgeRequest) -> dict[str, Any]:
        preferences.judge(body.annotator, body.item, body.token, body.ranks, body.comment.strip(), body.seconds)
        return take(body)

    def skip(body: ItemRequest) -> dict[str, Any]:
        preferences.skip(body.annotator, body.item, body.token)
        return take(body)

    def correct(body: CorrectRequest) -> dict[str, Any]:
        preferences.correct(body.annotator, body.item, body.token, body.place, body.text)
        return {"recorded": True, "event": preferences.last(body.annotator)}

    def undo(body: UndoRequest) -> dict[str, Any]:
        event = preferences.undo(body.annotator, body.event)
        item = preferences.items.get(event["item"]) if event is not None else None
        if event is None or item is not None:
            return shown(item, body.annotator)
        what = f"The {event['event']} is undone. Its prompt is not among those that are loaded: {event['prompt'][:80]}"
        return take(body) | {"notice": what}

    async def in_place(action: Callable[..., dict[str, Any]], *arguments: Any) -> Response:
        """Run an action in a thread, within the limit of requests."""
        places.take()
        try:
            return JSONResponse(await asyncio.to_thread(action, *arguments))
        except StaleError as error:
            raise ApiError(409, str(error), code="stale") from error
        except UserError as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        finally:
            places.leave()

    def route(path: str, kind: type[Strict], action: Callable[[Any], dict[str, Any]]) -> Route:
        async def endpoint(request: Request) -> Response:
            return await in_place(action, parse(kind, await request.body()))

        return Route(f"/annotation/{path}", endpoint, methods=["POST"])

    async def numbers(request: Request) -> Response:
        return await in_place(statistics, preferences, len(collection.prompts))

    return [
        Route("/", annotation_page),
        route("next", NextRequest, take),
        route("judge", JudgeRequest, judge),
        route("skip", ItemRequest, skip),
        route("correct", CorrectRequest, correct),
        route("undo", UndoRequest, undo),
        Route("/annotation/statistics", numbers),
    ]
