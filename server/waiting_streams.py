"""Streams to a model that is still to be loaded: the client hears of us until the stream itself begins.

As long as nothing was sent, what goes wrong is an answer with a true status. After an interval of pings the
answer begins, and what goes wrong then is what the API has for the end of a stream that can't go on.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.error_answers import anthropic_error
from server.errors import ApiError
from server.formats.messages import PING
from server.models import Models
from server.paths import is_messages, is_responses, route_path
from server.served import ServedModel
from server.sse import (
    COMMENT,
    ClientDisconnectedError,
    StreamResponse,
    StreamStyle,
    cancelled,
    encoded,
    named_frame,
    told,
    until_done,
)
from server.state import MODEL, ServerState

Answer = Callable[[ServerState], Awaitable[Response]]
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # as those of any stream


async def stream_when_loaded(
    request: Request, models: Models, model: ServedModel, answer: Answer
) -> Response:
    """What `answer` gives, once `model` is loaded; before that, after a while, the beginning of a stream."""
    seconds = models.settings.ping_interval
    with ExitStack() as use:
        use.enter_context(model.used())
        loading = asyncio.create_task(models.loaded(model))
        try:
            await until_done(loading, request, seconds)
            if loading.done():
                return await answer(loading.result())
        except BaseException:
            await cancelled(loading)
            raise
        return _WaitingStream(request, loading, answer, seconds, use.pop_all())


def _style(scope: Scope, request_id: str) -> StreamStyle:
    """How the API of a path writes comments, and errors of a stream that it hasn't begun."""
    if is_messages(scope):
        return StreamStyle(
            filler=None,
            ping=PING,
            failure=lambda error: [
                named_frame("error", json.dumps(anthropic_error(error.message, error.status, request_id)))
            ],
        )
    if is_responses(scope):
        return StreamStyle(
            filler=None,
            failure=lambda error: [
                named_frame("error", json.dumps({"type": "error", "sequence_number": 0, **_details(error)}))
            ],
        )
    return StreamStyle(filler=lambda: _empty_chunk(scope), ping=COMMENT)


def _empty_chunk(scope: Scope) -> str:
    """Ends a pause before an error: a reader of blocks would drop what stands behind a comment."""
    is_chat = route_path(scope).startswith("/v1/chat")
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    chunk = {"id": scope.get("request_id", ""), "object": kind, "created": int(time.time())}
    return json.dumps({**chunk, "model": scope[MODEL], "choices": []})


def _details(error: ApiError) -> dict[str, str | None]:
    return {"code": error.code, "message": error.message, "param": error.param}


class _WaitingStream(Response):
    """Sends pings until the model is loaded, then the answer, whose headers are too late."""

    def __init__(
        self,
        request: Request,
        loading: asyncio.Task[ServerState],
        answer: Answer,
        ping_seconds: float,
        use: ExitStack,
    ) -> None:
        """`use` keeps the model loaded; it ends when there is an answer."""
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._request = request
        self._loading = loading
        self._answer = answer
        self._ping_seconds = ping_seconds
        self._use = use

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the response."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            response = await self._answer_or_error(scope, send)
        except ClientDisconnectedError:
            return
        finally:
            self._use.close()
            await cancelled(self._loading)
        await response(scope, receive, _bodies_of(send))

    async def _answer_or_error(self, scope: Scope, send: Send) -> Response:
        """Raises ClientDisconnectedError."""
        style = _style(scope, scope.get("request_id", ""))
        try:
            while not self._loading.done():
                await send({"type": "http.response.body", "body": style.ping, "more_body": True})
                await until_done(self._loading, self._request, self._ping_seconds)
            response = await self._answer(self._loading.result())
        except ClientDisconnectedError:
            raise
        except Exception as error:
            filler = [style.filler()] if style.filler else []
            return Response(b"".join(map(encoded, [*filler, *style.failure(told(error))])))
        if isinstance(response, StreamResponse):
            response.follow_pause()
        return response


def _bodies_of(send: Send) -> Send:
    async def send_body(message: Message) -> None:
        if message["type"] == "http.response.body":
            await send(message)

    return send_body
