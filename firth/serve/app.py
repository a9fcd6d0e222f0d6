"""The web application: its routes, the checks that every request passes first, and its OpenAPI document."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from firth.serve import inference
from firth.serve.board import Board, board_routes
from firth.serve.completions import chat_complete, complete
from firth.serve.config import ServeConfig
from firth.serve.guard import Guard
from firth.serve.inference import attention
from firth.serve.operations import Context, Operation, Places
from firth.serve.pages import STATIC, models_page, site
from firth.serve.registry import ModelRegistry, ServedModel
from firth.serve.responses import ApiError
from firth.serve.schemas import (
    AttentionRequest,
    AttentionResponse,
    ChatChunk,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorBody,
    FillRequest,
    FillResponse,
    HealthResponse,
    ModelEntry,
    ModelList,
    PredictRequest,
    PredictResponse,
    RewardRequest,
    RewardResponse,
    ScoreRequestBody,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from firth.types import VERSION

REF = "#/components/schemas/{model}"
ERRORS = {
    400: "The request is invalid.", 401: "The API key is missing or wrong.", 403: "The host or the origin is refused.",
    404: "There is no such model.", 408: "The body was not complete in time.", 413: "The body is too long.",
    415: "The body is no JSON.", 429: "Too many requests run or wait.", 500: "The server failed.",
    501: "The server lacks a package.", 503: "The server is stopping, or its engine has failed.",
    504: "The answer was not complete in time.",
}  # fmt: skip


def document(operations: Sequence[Operation], has_key: bool) -> dict[str, Any]:
    """Return the document.

    Args:
        operations: The POST routes.
        has_key: Whether requests need a key.
    """
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (kind, "serialization") for kind in (ErrorBody, HealthResponse, ModelEntry, ModelList)
    ]
    for one in operations:
        modes += [(one.request, "validation"), (one.response, "serialization")]
        modes += [(one.event, "serialization")] if one.event is not None else []
    names, schemas = models_json_schema(list(dict.fromkeys(modes)), ref_template=REF)

    def reference(kind: type[BaseModel], mode: JsonSchemaMode = "serialization") -> dict[str, Any]:
        return names[kind, mode]

    def responses(kind: type[BaseModel], event: type[BaseModel] | None = None) -> dict[str, Any]:
        content: dict[str, Any] = {"application/json": {"schema": reference(kind)}}
        if event is not None:
            content["text/event-stream"] = {"schema": {"type": "string", "description": f"Events: {event.__name__}."}}
        refused = {"application/json": {"schema": reference(ErrorBody)}}
        return {"200": {"description": "The answer.", "content": content}} | {
            str(status): {"description": text, "content": refused} for status, text in ERRORS.items()
        }

    paths: dict[str, Any] = {
        "/health": {
            "get": {"summary": "Whether the server answers", "security": [], "responses": responses(HealthResponse)}
        },
        "/v1/models": {"get": {"summary": "List the models", "responses": responses(ModelList)}},
        "/v1/models/{model}": {
            "get": {
                "summary": "Return a model",
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
                "responses": responses(ModelEntry),
            }
        },
    }
    for one in operations:
        body = {"required": True, "content": {"application/json": {"schema": reference(one.request, "validation")}}}
        answers = responses(one.response, one.event)
        paths[one.path] = {"post": {"summary": one.summary, "requestBody": body, "responses": answers}}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "firth", "version": VERSION, "description": "Models served by `firth serve`."},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }
    if has_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


STOP_SECONDS = 2.0
"""Most seconds at the end for the computation that runs; answers have had `drain_seconds` before."""

OPERATIONS = (
    Operation("/v1/completions", "Continue texts", CompletionRequest, CompletionResponse, complete, CompletionResponse),
    Operation("/v1/chat/completions", "Answer a chat", ChatRequest, ChatResponse, chat_complete, ChatChunk),
    Operation("/v1/embeddings", "Turn texts into vectors", EmbeddingRequest, EmbeddingResponse, inference.embed),
    Operation("/fill", "Fill the gaps of a text", FillRequest, FillResponse, inference.fill),
    Operation("/classify", "Classify records", PredictRequest, PredictResponse, inference.predict_with("classify")),
    Operation("/tag", "Tag the words of records", PredictRequest, PredictResponse, inference.predict_with("tag")),
    Operation("/answer", "Answer from passages", PredictRequest, PredictResponse, inference.predict_with("answer")),
    Operation("/score", "Score each token of a text", ScoreRequestBody, ScoreResponse, inference.score),
    Operation("/attention", "Show attention weights", AttentionRequest, AttentionResponse, attention),
    Operation("/tokenize", "Split a text into tokens", TokenizeRequest, TokenizeResponse, inference.tokenize),
    Operation("/reward", "Rate answers", RewardRequest, RewardResponse, inference.reward),
)
"""The POST routes of models."""


def create_app(
    models: ModelRegistry | None,
    config: ServeConfig,
    extra_routes: Sequence[BaseRoute] = (),
    extra_operations: Sequence[Operation] = (),
    board: Board | None = None,
) -> Starlette:
    """Return the application.

    Handlers find the models in `request.app.state.models` and the configuration in `request.app.state.config`.

    Args:
        models: The models; None for an application of pages alone.
        config: The configuration.
        extra_routes: Further routes, before the static files.
        extra_operations: Further POST routes of models, which are in the OpenAPI document too.
        board: The board of runs; None for none.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if models is not None:
            models.thread.start()
        try:
            yield
        finally:
            if models is not None:
                await asyncio.to_thread(models.thread.stop, STOP_SECONDS)

    async def views(request: Request) -> Response:
        return JSONResponse(site(models, board is not None))

    routes: list[BaseRoute] = [Route("/health", health), *extra_routes, Route("/views", views)]
    routes += board_routes(board) if board is not None else []
    if models is not None:
        operations = (*OPERATIONS, *extra_operations)
        context = Context(models, config.limits, Places(config.limits.max_requests))
        routes += [one.route(context) for one in operations]
        routes += [Route("/v1/models", list_models), Route("/v1/models/{model:path}", show_model)]
        described = document(operations, bool(config.api_key))
        routes.append(Route("/openapi.json", lambda _: JSONResponse(described)))
    app = Starlette(
        routes=[*routes, Route("/", models_page), Mount("/static", StaticFiles(directory=STATIC))],
        middleware=[Middleware(Guard, config)],
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error},
        lifespan=lifespan,
    )
    app.state.models, app.state.config = models, config
    return app


async def health(request: Request) -> Response:
    """Return whether the server computes; this route needs no key."""
    models = request.app.state.models
    if models is not None and not models.thread.alive:
        raise ApiError(503, "the engine has failed: start the server again", code="engine_failed")
    return JSONResponse(HealthResponse(status="ok").model_dump())


async def list_models(request: Request) -> Response:
    """Return the models of the server."""
    found = ModelList(data=[entry(served) for served in request.app.state.models.models.values()])
    return JSONResponse(found.model_dump())


async def show_model(request: Request) -> Response:
    """Return a model of the server."""
    return JSONResponse(entry(request.app.state.models.get(request.path_params["model"])).model_dump())


def entry(served: ServedModel) -> ModelEntry:
    """Return the entry of a model in the list."""
    context = served.model.evaluated.model.context
    return ModelEntry(
        id=served.name, created=served.created, max_model_len=context, capabilities=list(served.capabilities)
    )


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
