"""Pure ASGI middleware: root path, request ids, HEAD, body limit, calls from other origins.

(Starlette's BaseHTTPMiddleware hides a client's disconnect from the routes.)
"""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.error_answers import error_answer
from server.errors import ForbiddenOriginError, error_body
from server.paths import is_messages

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RootPathMiddleware:
    """Says under which path a proxy serves the application.

    Unlike uvicorn's own option this lets the proxy cut that path off or not: the routes understand both.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Changes nothing but the scope."""
        scope["root_path"] = self._root_path
        await self._app(scope, receive, send)


class RequestIdMiddleware:
    """Takes the client's X-Request-Id or makes one, and returns it with every answer.

    Clients of Anthropic's API look for it under the name `request-id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on everything that isn't HTTP."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        names = ("X-Request-Id", "Request-Id") if is_messages(scope) else ("X-Request-Id",)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in names:
                    headers[name] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class HeadMiddleware:
    """Answers HEAD as GET, without the body: monitors and load balancers ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on everything else."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


class BodyLimitMiddleware:
    """Refuses bodies of more than `limit` bytes; where no route reads one, only if that is announced."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on everything that isn't HTTP."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._limit):
            body = error_body(self._message, "invalid_request_error", code="request_entity_too_large")
            await error_answer(scope, body, 413)(scope, receive, send)
            return
        if scope["method"] != "POST":  # nobody reads it, but who listens for a disconnect must meet no error
            await self._app(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._limit:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, receive_counted, send)

    @property
    def _message(self) -> str:
        return f"the body is larger than {self._limit} bytes"


class OriginMiddleware(CORSMiddleware):
    """Lets pages of the given origins call the server; cookies are never used, so none are allowed."""

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After", "X-Speed-Warning"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """The library's answer, a refusal in the shape of all errors."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        error = ForbiddenOriginError(bytes(response.body).decode())
        refusal = JSONResponse(error.body(), error.status)  # which a browser alone reads, whatever the path
        refusal.headers["Vary"] = response.headers["Vary"]
        return refusal
