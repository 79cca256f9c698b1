"""Server-sent events: frames, keep-alive comments, and what happens when either side goes away.

Invariants: a stream's resources are freed however it ends, also if it never began; nothing is sent
before the first item exists, so that an early failure is an answer with a true status; a failure after
that is an error frame, and [DONE] is always the last frame.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, EngineFailureError

T = TypeVar("T")
logger = logging.getLogger(__name__)

PING_SECONDS = 15
SEND_TIMEOUT = 60.0  # seconds in which a client takes nothing at all before it counts as dead
DONE = "[DONE]"


class ClientDisconnectedError(Exception):
    """The client has gone: there is nobody to answer."""


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled with ClientDisconnectedError if the client goes first.

    The body of `request` must have been read.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def frames(items: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The data of each frame: the items, an error if one is raised after the first item, [DONE]."""
    started = False
    try:
        async for item in items:
            yield item
            started = True
    except Exception as error:
        if not started:
            raise
        yield json.dumps(_error_body(error))
    finally:
        await items.aclose()
    yield DONE


def _error_body(error: Exception) -> dict[str, Any]:
    if isinstance(error, ApiError):
        return error.body()
    logger.error("a stream failed", exc_info=error)
    return EngineFailureError().body()


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for data in rest:
        yield data


class StreamResponse(EventSourceResponse):
    """Sends frames, and calls `on_close` when that is over, for whatever reason."""

    def __init__(
        self,
        first: str,
        rest: AsyncIterator[str],
        on_close: Callable[[], None],
        *,
        shutdown_grace_period: float,
        send_timeout: float = SEND_TIMEOUT,
    ) -> None:
        super().__init__(
            _chain(first, rest),
            sep="\n",  # the default, CRLF, breaks clients that split at "\n\n"
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            send_timeout=send_timeout,
            # The library cancels streams when a signal arrives; the server ends them in its own time.
            shutdown_grace_period=shutdown_grace_period,
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the response."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.warning("a client took nothing for %.0f seconds and was dropped", self.send_timeout)
        finally:
            # Not in a generator: one that never started never runs its finally.
            self._on_close()


async def stream_response(
    request: Request,
    items: AsyncGenerator[str, None],
    on_close: Callable[[], None],
    shutdown_grace_period: float,
) -> StreamResponse:
    """Waits for the first item, then answers. Raises what `items` raises before it."""
    data = frames(items)
    first = await unless_disconnected(request, anext(data))
    return StreamResponse(first, data, on_close, shutdown_grace_period=shutdown_grace_period)
