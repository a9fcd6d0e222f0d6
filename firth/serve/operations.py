"""Operations: a path with its request and response models. From them come the routes and the OpenAPI document.

A request is read and validated, counted against the limit of requests, answered, and given up once its client is gone or its
time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from firth.generate.slices import can_read_in_chunks
from firth.serve.config import ServeLimits
from firth.serve.registry import ModelRegistry, ServedModel
from firth.serve.responses import ApiError, EventStream, disconnected
from firth.types import UserError

RETRY_SECONDS = 1
T = TypeVar("T")
LONG_CHARACTERS = 10_000
"""Longer texts are tokenized in a thread of their own, so that other requests do not wait."""
SLICE_TOKENS = 512
"""Most tokens of a slice of a job, unless one forward pass needs more (`Context.check_pass`). Streams wait for a slice between
two tokens."""


class Places:
    """Counts the requests that run or wait, up to a limit.

    Args:
        limit: The most.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0

    def take(self) -> None:
        """Take a place; raise an ApiError with 429 if there is none."""
        if self.taken >= self.limit:
            raise ApiError(
                429, f"{self.taken} requests run or wait already: try again later", code="rate_limit_exceeded",
                headers={"retry-after": str(RETRY_SECONDS)},
            )  # fmt: skip
        self.taken += 1

    def leave(self) -> None:
        """Give the place back."""
        self.taken -= 1


@dataclass(frozen=True)
class Context:
    """What handlers work with.

    Args:
        models: The models.
        limits: The limits.
        places: The places of requests.
    """

    models: ModelRegistry
    limits: ServeLimits
    places: Places

    def check_pass(self, served: ServedModel, tokens: int, param: str, in_chunks: bool = False) -> None:
        """Raise an ApiError for a text that would hold up all answers, since the model reads it in one forward pass.

        Args:
            served: The model.
            tokens: Tokens of the text.
            param: The field of the request.
            in_chunks: Whether a decoder reads it in chunks.
        """
        most = self.limits.max_pass_tokens
        if tokens > most and not (in_chunks and can_read_in_chunks(served.model.evaluated.model)):
            raise ApiError(
                400, f"{param}: {tokens:,} tokens would be read in one pass, of at most {most:,} (the limit max_pass_tokens)",
                param=param, code="limit_exceeded",
            )  # fmt: skip


Handler = Callable[[Context, Any], Awaitable[BaseModel | EventStream]]


@dataclass(frozen=True)
class Operation:
    """A POST route.

    Args:
        path: The path.
        summary: What it does, for the document.
        request: The model of the body.
        response: The model of the response.
        handler: Answers a valid request.
        event: The model of an event, for routes that stream.
    """

    path: str
    summary: str
    request: type[BaseModel]
    response: type[BaseModel]
    handler: Handler
    event: type[BaseModel] | None = None

    def route(self, context: Context) -> Route:
        """Return the route."""

        async def endpoint(request: Request) -> Response:
            body = await request.body()
            context.places.take()
            try:
                parsed = parse(self.request, body)
                answer = await answer_or_give_up(request, self.handler(context, parsed), context.limits)
            except BaseException:
                context.places.leave()
                raise
            if isinstance(answer, EventStream):  # the place is taken until the last event
                answer.on_end = context.places.leave
                return answer
            context.places.leave()
            return Response(answer.model_dump_json(by_alias=True), media_type="application/json")

        return Route(self.path, endpoint, methods=["POST"])


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """Return a request from its JSON.

    Raises:
        ApiError: It is no JSON in UTF-8, or it does not fit the model; the message names the field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    except UnicodeEncodeError:  # a lone surrogate that got past the parser
        raise ApiError(400, "the body has a character that is no Unicode scalar value", code="invalid_json") from None
    deepest = max(errors, key=lambda one: len(one["loc"]))  # of the members of a union, the one that fits best
    unknown = [one for one in errors if one["type"] == "extra_forbidden"]
    raise _refusal(unknown[0] if unknown else deepest)


def _refusal(error: ErrorDetails) -> ApiError:
    """Return the error for what pydantic found first."""
    # pydantic also names the members of unions: list[str], TextFormat
    name = ".".join(str(one) for one in error["loc"] if re.fullmatch(r"\d+|(?!str$|int$|float$)[^\[A-Z-]+", str(one)))[
        :200
    ]
    if error["type"] == "json_invalid":
        return ApiError(
            400, f"the body is no valid JSON: {error['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"there is no field {name!r} in this request", param=name, code="unknown_field")
    reason = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return ApiError(
        400, f"{name or 'the body'}: {reason[:1].lower()}{reason[1:]}", param=name or None, code="invalid_value"
    )


async def answer_or_give_up(
    request: Request, answer: Awaitable[BaseModel | EventStream], limits: ServeLimits
) -> BaseModel | EventStream:
    """Return the answer; cancel it if the client is gone or the time is over.

    Raises:
        ApiError: The time is over, or the request cannot be answered.
    """
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, timeout=limits.request_seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ApiError(499, "the client closed the connection", code="client_closed")
        raise too_slow(limits)
    except UserError as error:
        raise ApiError(400, str(error), code="invalid_request") from error
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def tokenizing(characters: int, job: Callable[[], T]) -> T:
    """Run a function that tokenizes so many characters, outside the event loop if they are many."""
    return await asyncio.to_thread(job) if characters > LONG_CHARACTERS else job()


def batches(items: Sequence[T], sizes: Sequence[int], most: int | None = None) -> Iterator[list[T]]:
    """Yield items in order, together as long as their sizes add up to `most`, by default SLICE_TOKENS.

    >>> list(batches("abcd", [300, 200, 600, 1]))
    [['a', 'b'], ['c'], ['d']]
    """
    most = SLICE_TOKENS if most is None else most
    some: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if some and total + size > most:
            yield some
            some, total = [], 0
        some.append(item)
        total += size
    if some:
        yield some


def too_slow(limits: ServeLimits) -> ApiError:
    """Return the error for an answer that takes too long."""
    return ApiError(504, f"the answer was not complete after {limits.request_seconds:g} seconds", code="timeout")
