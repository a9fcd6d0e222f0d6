"""Run an application on an address until SIGTERM or Ctrl-C: it takes no new requests then, and finishes those that run."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from firth.serve.config import ServeConfig
from firth.types import LOGGER, UserError

BACKLOG = 128
"""Connections that the system accepts before the server does."""
KEEP_ALIVE_SECONDS = 10


def serve(app: Starlette, config: ServeConfig) -> None:
    """Serve an application; return once it has stopped.

    Raises:
        UserError: The address cannot be listened on.
    """
    listener = listen(config)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    server = uvicorn.Server(uvicorn_config(app, config))
    # Before uvicorn handles it, and again once it has stopped, when it raises the signal that it received.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    LOGGER.info(f"serving at http://{shown}:{port} (Ctrl-C stops it)")
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    LOGGER.info("the server has stopped")


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket that listens on the address."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"cannot listen on {config.host} port {config.port} ({error}): choose another address with --host and --port"
        ) from None
    return listener


def uvicorn_config(app: Starlette, config: ServeConfig) -> uvicorn.Config:
    """Return the configuration of uvicorn."""
    limits = config.limits

    class Protocol(PatientProtocol):
        header_seconds, max_connections = limits.header_seconds, limits.max_connections

    return uvicorn.Config(
        app, http=Protocol, ws="none", log_level="error", access_log=False, server_header=False, date_header=False,
        proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=round(limits.drain_seconds),
        lifespan="on", backlog=BACKLOG,
    )  # fmt: skip


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which waits for the headers of a request for a limited time, and has a limited number of connections."""

    header_seconds = 10.0
    max_connections = 512
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        idle = self._idle
        super().data_received(data)
        if not self._idle:
            self._stop_waiting()
        elif not idle or self.timer is None:  # a part of the headers of a further request
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _idle(self) -> bool:
        """Whether no request is complete up to its body."""
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_headers(self) -> None:
        self._stop_waiting()
        self.timer = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
