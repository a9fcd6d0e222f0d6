"""The OpenAPI document of the server, generated from the models that validate requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from firth import __version__
from firth.serve.operations import Operation
from firth.serve.schemas import ErrorBody, HealthResponse, ModelEntry, ModelList

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
        "info": {"title": "firth", "version": __version__, "description": "Models served by `firth serve`."},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }
    if has_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
