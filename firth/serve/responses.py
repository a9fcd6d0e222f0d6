"""Responses: errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}, and server-sent events.

The parts of a response of events are sent as they come (https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from firth.serve.config import ServeLimits
from firth.types import LOGGER, UserError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status -> type of the error; the other ones below 500 are `invalid_request_error`."""


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: The HTTP status.
        message: One sentence.
        param: The field of the request.
        code: A name for programs.
        headers: Further headers of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as the response has it."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body, self.status, self.headers)


DONE = b"data: [DONE]\n\n"


class SlowReaderError(Exception):
    """The client left a part of the answer unread for too long."""


class EventStream(Response):
    """A stream of events, which ends with [DONE].

    It is given up if the client is gone, reads too slowly, or the whole answer takes too long. An error in it is an event.

    Args:
        events: The events.
        limits: The limits.

    Attributes:
        on_end: Called once the stream has ended or was given up.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[BaseModel, None], limits: ServeLimits) -> None:
        super().__init__(None)
        self.events, self.limits = events, limits
        self.on_end: Callable[[], None] = lambda: None
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (task, gone):
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError, SlowReaderError):
                    await one
            await self.events.aclose()
            self.on_end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                async for event in self.events:
                    await self._send_part(send, b"data: " + event.model_dump_json().encode() + b"\n\n")
            await self._send_part(send, DONE)
        except TimeoutError:
            await self._send_error(send, ApiError(504, "the answer was not complete in time", code="timeout"))
        except (ApiError, UserError) as error:
            refused = error if isinstance(error, ApiError) else ApiError(400, str(error), code="invalid_request")
            await self._send_error(send, refused)
        except SlowReaderError:
            raise
        except Exception as error:
            LOGGER.warning(f"a stream failed: {type(error).__name__}: {error}", exc_info=error)
            await self._send_error(send, ApiError(500, "the server failed on this request", code="internal_error"))
        await send({"type": "http.response.body", "body": b""})

    async def _send_error(self, send: Send, error: ApiError) -> None:
        await self._send_part(send, f"data: {json.dumps(error.body)}\n\n".encode())

    async def _send_part(self, send: Send, part: bytes) -> None:
        try:
            async with asyncio.timeout(self.limits.send_seconds):
                await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.sleep(0)  # a client that has gone is noticed between two parts
        except TimeoutError:
            raise SlowReaderError from None


async def disconnected(receive: Receive) -> None:
    """Return once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
