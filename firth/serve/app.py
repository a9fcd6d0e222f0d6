"""The web application: its routes, and the checks that every request passes first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from firth.serve.config import ServeConfig
from firth.serve.errors import ApiError
from firth.serve.guard import Guard
from firth.serve.registry import ModelRegistry

STATIC = Path(__file__).parent / "static"


def create_app(models: ModelRegistry | None, config: ServeConfig, extra_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """Return the application.

    Handlers find the models in `request.app.state.models` and the configuration in `request.app.state.config`.

    Args:
        models: The models; None for an application of pages alone.
        config: The configuration.
        extra_routes: Further routes, before the static files.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if models is not None:
            models.thread.start()
        try:
            yield
        finally:
            if models is not None:
                models.thread.stop()

    routes: list[BaseRoute] = [
        Route("/health", health),
        *extra_routes,
        Route("/", index),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, config)],
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error},
        lifespan=lifespan,
    )
    app.state.models, app.state.config = models, config
    return app


async def health(request: Request) -> Response:
    """Return whether the server answers; this route needs no key."""
    return JSONResponse({"status": "ok"})


async def index(request: Request) -> Response:
    """Return the first page."""
    return FileResponse(STATIC / "index.html", media_type="text/html")


async def on_api_error(request: Request, error: Any) -> Response:
    """Return the response to an ApiError."""
    if error.status == 413:
        raise error  # the guard sends it, since the body is not complete
    response: Response = error.response
    return response


async def on_http_error(request: Request, error: Any) -> Response:
    """Return Starlette's errors, such as an unknown path, in OpenAI's shape."""
    path, method = request.url.path[:200], request.method
    messages = {404: f"there is no {path}", 405: f"{path} does not accept {method}"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response
