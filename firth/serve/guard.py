"""ASGI middleware that checks every request before a route sees it, and sets the security headers of every response.

The order: Host, Origin, key, content type and size. Errors have OpenAI's shape, also those of Starlette.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from firth.serve.config import ServeConfig
from firth.serve.responses import ApiError
from firth.types import LOGGER

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
OPEN_PATH = "/health"
"""The path that needs no key."""
DISCARD_SECONDS = 1.0
"""How long the rest of a refused body is read and dropped, so that the client reads the response and no reset connection."""


class Guard:
    """Middleware: checks, security headers, and errors that no route handles.

    Args:
        app: The application.
        config: The configuration of the server.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, LimitedBody(receive, self.config), send_with_headers)
        except ApiError as error:
            if started:
                raise
            await self._refuse(error, scope, receive, send_with_headers)
        except Exception as error:  # a fault of the server: the response has no details
            LOGGER.warning(f"{scope['method']} {scope['path']}: {type(error).__name__}: {error}", exc_info=error)
            if started:
                raise
            fault = ApiError(500, "the server failed on this request: its log has the reason", code="internal_error")
            await fault.response(scope, receive, send_with_headers)

    def check(self, scope: Scope) -> None:
        """Raise an ApiError if the headers of a request are refused."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        parsed = _split_host(hosts[0]) if len(hosts) == 1 else None
        if parsed is None:
            raise ApiError(400, "the request needs one valid Host header", code="invalid_host")
        if not self.config.accepts_host(parsed[0]):
            raise ApiError(
                403,
                f"the host {hosts[0][:100]!r} is not this server's: allow it with --allow-host",
                code="invalid_host",
            )
        self._check_origin(headers, hosts[0])
        if self.config.api_key and scope["path"] != OPEN_PATH and not self._has_key(headers):
            # A browser asks its user for a name and a password, and the password is the key.
            challenge = {"www-authenticate": 'Bearer, Basic realm="firth", charset="UTF-8"'}
            raise ApiError(
                401,
                "this server needs its API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=challenge,
            )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            self._check_body(headers)

    def _check_origin(self, headers: Headers, host: str) -> None:
        """Refuse requests that a page of another site makes; programs send no origin."""
        origins = headers.getlist("origin")
        same = {*origins} <= {f"http://{host}", f"https://{host}"}
        cross = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if not same or (cross and headers.get("sec-fetch-mode") != "navigate"):
            raise ApiError(403, "pages of other sites may not call this server", code="invalid_origin")

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip()
        if scheme.lower() == "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
        elif scheme.lower() != "bearer":
            given = ""
        return hmac.compare_digest(given.encode("latin-1", "replace"), self.config.api_key.encode())

    def _check_body(self, headers: Headers) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, "the body must be JSON, with Content-Type: application/json", code="invalid_content_type"
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body must not be compressed", code="invalid_content_encoding")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.config.limits.max_body_bytes:
            raise too_large(self.config)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Send an error, then read on for a moment if the body is not complete, and close the connection."""
        if error.status != 413:
            await error.response(scope, receive, send)
            return
        response = error.response
        response.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


class LimitedBody:
    """`receive` of a request that raises an ApiError if the body is too long or too slow.

    Args:
        receive: The channel of the server.
        config: The configuration with the limits.
    """

    def __init__(self, receive: Receive, config: ServeConfig) -> None:
        self.receive, self.config, self.bytes, self.complete = receive, config, 0, False
        self.deadline: float | None = None

    async def __call__(self) -> Message:
        if self.complete:
            return await self.receive()
        loop = asyncio.get_running_loop()
        self.deadline = self.deadline or loop.time() + self.config.limits.body_seconds
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError:
            raise ApiError(
                408, f"the body was not complete after {self.config.limits.body_seconds:g} seconds", code="timeout",
                headers={"connection": "close"},
            ) from None  # fmt: skip
        self.bytes += len(message.get("body", b""))
        if self.bytes > self.config.limits.max_body_bytes:
            raise too_large(self.config)
        self.complete = not message.get("more_body", False)
        return message


def too_large(config: ServeConfig) -> ApiError:
    """Return the error for a body above the limit."""
    return ApiError(413, f"the body is longer than {config.limits.max_body_bytes:,} bytes", code="body_too_large")


def _split_host(host: str) -> tuple[str, int | None] | None:
    """Return the name and the port of a Host header; None if it is invalid.

    >>> _split_host("[::1]:8000"), _split_host("localhost"), _split_host("a@b"), _split_host("a:b")
    (('::1', 8000), ('localhost', None), None, None)
    """
    try:
        parts: Any = urlsplit(f"//{host}")
        port = parts.port
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and parts.netloc == host and "@" not in host else None
