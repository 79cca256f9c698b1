"""Errors as HTTP answers, in the shape of the API whose path was asked for.

    {"error": {"message", "type", "param", "code"}}                  OpenAI's, on all paths but one
    {"type": "error", "error": {"type", "message"}, "request_id"}    Anthropic's, on and below /v1/messages

Invariant: every answer with a status >= 400 that the application gives has one of these bodies.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from server.errors import ApiError, error_body, quote
from server.paths import is_messages

# What Anthropic calls them; 503 is its 529, which no other client knows.
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def anthropic_error(message: str, status: int, request_id: str) -> dict[str, Any]:
    """An error as Anthropic's API writes it; also the content of an error in a stream."""
    kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def error_answer(
    scope: Scope, body: dict[str, Any], status: int, headers: Mapping[str, str] | None = None
) -> Response:
    """The answer with `body`, an error as `error_body` makes it, or what the path wants in its place."""
    if is_messages(scope):
        body = anthropic_error(body["error"]["message"], status, scope.get("request_id", ""))
    return JSONResponse(body, status, headers)


def error_response(error: ApiError, scope: Scope) -> Response:
    """The answer that says `error` to who asked for the path in `scope`."""
    return error_answer(scope, error.body(), error.status, error.headers)


async def _handle_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.scope)


async def _handle_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: no such route, wrong method, unreadable body, body too large."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {quote(request.url.path)}: {error.detail}"
    code = HTTPStatus(error.status_code).name.lower()
    body = error_body(message, "invalid_request_error", code=code)
    return error_answer(request.scope, body, error.status_code, error.headers)


async def _handle_bug(request: Request, _: Exception) -> Response:
    """The framework raises the exception again after this answer, so that the server logs it."""
    # This handler runs outside every middleware: the request's id must be added by hand.
    request_id = request.scope.get("request_id", "")
    body = error_body("internal server error", "server_error", code="internal_error")
    return error_answer(request.scope, body, 500, {"X-Request-Id": request_id})


def install_error_handlers(app: FastAPI) -> None:
    """Makes every failure of `app` an answer of the right shape."""
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(HTTPException, _handle_http)
    app.add_exception_handler(Exception, _handle_bug)
