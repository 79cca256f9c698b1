"""The OpenAPI document: what FastAPI finds in the routes, corrected where our rules differ from its own.

Invariant: an answer that a route can give, its status, type and shape, is in the document, and nothing
else is (no 422, which FastAPI adds by itself).
"""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from server.paths import MESSAGES
from server.schemas.errors import ErrorResponse
from server.schemas.messages import AnthropicErrorResponse

Json = dict[str, Any]

HTTP_METHODS = ("get", "post")
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}
HEADERS = {
    401: {"WWW-Authenticate": {"description": "how to send a key", "schema": {"type": "string"}}},
    429: RETRY_AFTER,
    503: RETRY_AFTER,
}
DESCRIPTIONS = {
    400: "A field is missing, unknown or out of its limits; `param` names it",
    401: "No valid API key",
    404: "There is no model of that name",
    413: "The body is too large",
    415: "The body isn't announced as JSON",
    429: "Too much is waiting already",
    500: "The engine failed while running the request",
    503: "The engine is loading or gone, no model can make room, or the server is shutting down",
}
EVENT_STREAM: Json = {
    "text/event-stream": {
        "schema": {"type": "string", "description": "with stream: frames `data: {json}`, [DONE] last"}
    }
}


def errors(*statuses: int) -> dict[int | str, Json]:
    """Documents errors of a route; goes into its `responses`."""
    return {status: _error(status, ErrorResponse) for status in statuses}


def anthropic_errors(*statuses: int) -> dict[int | str, Json]:
    """Documents errors of a route of Anthropic's API; goes into its `responses`."""
    return {status: _error(status, AnthropicErrorResponse) for status in statuses}


def _error(status: int, model: type[BaseModel]) -> Json:
    found: Json = {"model": model, "description": DESCRIPTIONS[status]}
    return found | ({"headers": HEADERS[status]} if status in HEADERS else {})


JSON_BODY = (400, 404, 413, 415)
GENERATION = {200: {"content": EVENT_STREAM}, **errors(*JSON_BODY, 429, 500, 503)}
EVENTS: Json = {
    "content": {
        "text/event-stream": {
            "schema": {"type": "string", "description": "with stream: frames `event: name`, `data: {json}`"}
        }
    },
    "headers": {
        "X-Speed-Warning": {
            "description": "which types of tools were left out",
            "schema": {"type": "string"},
        }
    },
}
RESPONSES = {200: EVENTS, **errors(*JSON_BODY, 429, 500, 503)}
ANTHROPIC_GENERATION = {200: EVENTS, **anthropic_errors(*JSON_BODY, 429, 500, 503)}


def install_document(
    app: FastAPI, model_names: list[str], *, allow_unknown_fields: bool, open_paths: list[str] | None
) -> None:
    """Makes `app` serve the corrected document. `open_paths` need no key; None: nothing does."""

    def document() -> Json:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes, description=__doc__)
            found["info"]["description"] = "OpenAI's API for looped language models, with speculation."
            _exact_limits(found)
            _drop_422(found)
            _name_models(found, model_names)
            if not allow_unknown_fields:
                _close_bodies(found)
            if open_paths is not None:
                _ask_for_keys(found, open_paths)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the way FastAPI documents


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, item in document["paths"].items():
        for method in HTTP_METHODS:
            if method in item:
                yield path, item[method]


def _bodies(document: Json) -> Iterator[Json]:
    """Schemas of request bodies and their parts: those that take unknown fields, to complain by name."""
    for schema in document["components"]["schemas"].values():
        if schema.get("additionalProperties") is True and "properties" in schema:
            yield schema


def _exact_limits(part: object) -> None:
    """FastAPI writes limits as floating-point numbers, in which 2**63 - 1 is 2**63."""
    if isinstance(part, dict):
        for name in ("minimum", "maximum"):
            if isinstance(part.get(name), float) and part[name].is_integer():
                part[name] = min(int(part[name]), 2**63 - 1)
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _exact_limits(inner)


def _drop_422(document: Json) -> None:
    for _, operation in _operations(document):
        operation["responses"].pop(str(HTTPStatus.UNPROCESSABLE_ENTITY.value), None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _name_models(document: Json, names: list[str]) -> None:
    """A request for another model is a 404, so that the names are part of the contract."""
    for schema in _bodies(document):
        if "model" in schema["properties"]:
            field = schema["properties"]["model"]
            field["enum"] = names if "model" in schema.get("required", []) else [*names, None]
    for _, operation in _operations(document):
        for parameter in operation.get("parameters", []):
            if parameter["name"] == "name":
                parameter["schema"]["enum"] = names


def _close_bodies(document: Json) -> None:
    for schema in _bodies(document):
        schema["additionalProperties"] = False


def _ask_for_keys(document: Json, open_paths: list[str]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operation in _operations(document):
        if path not in open_paths:
            operation["security"] = [{"key": []}]
            model = AnthropicErrorResponse if path.startswith(MESSAGES) else ErrorResponse
            reference = {"$ref": f"#/components/schemas/{model.__name__}"}
            answer = {"description": DESCRIPTIONS[401], "headers": HEADERS[401]}
            operation["responses"]["401"] = answer | {"content": {"application/json": {"schema": reference}}}
