"""Server-sent events: frames, keep-alive comments, and what happens when either side goes away.

Invariants: a stream's resources are freed however it ends, also if it never began; a failure that shows
within the interval of pings is an answer with a true status, a later one an error frame; no stream is
silent for longer than that; the last frame is always the one that the API has for the end, such as [DONE].

How a comment looks is decided by the clients that are out there. With a blank line behind it (": ping", "")
it is an event without data, which openai-go before 3.43 gives to its JSON parser: the stream breaks. Without
one it belongs to the frame that follows, which clients that split at blank lines and look at the first
character then drop (vLLM's and EvalScope's benchmarks). So a comment is a line alone, and the frame that
ends a pause is a filler: a chunk that says nothing.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from server.errors import ApiError, EngineFailureError

T = TypeVar("T")
logger = logging.getLogger(__name__)

SEND_TIMEOUT = 60.0  # seconds in which a client takes nothing at all before it counts as dead
DONE = "[DONE]"
COMMENT = b": ping\n"
# Characters at which clients that split text into lines, such as Python's splitlines, cut a frame.
LINE_ENDS = re.compile("[\x85\u2028\u2029]")
CLIENT_CLOSED_REQUEST = 499  # nginx's status; nobody receives it, but access logs show it


Frame = str | ServerSentEvent  # the data alone, or with the name of an event


def _error_frames(error: ApiError) -> list[Frame]:
    return [json.dumps(error.body()), DONE]


@dataclass(frozen=True)
class StreamStyle:
    """What an API sends in a stream beside its items."""

    filler: Callable[[], Frame] | None  # makes the frame that ends a pause, where clients need one
    ping: bytes = COMMENT
    last: Sequence[Frame] = (DONE,)
    failure: Callable[[ApiError], Sequence[Frame]] = _error_frames  # what comes in place of `last`


def named_frame(event: str, data: str) -> Frame:
    """A frame with the name of its event. `data` is JSON."""
    return ServerSentEvent(_escaped(data), event=event, sep="\n")


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
    try:
        await until_done(task, request, None)
        return task.result()
    finally:
        await cancelled(task)


async def until_done(task: asyncio.Future[T], request: Request, seconds: float | None) -> None:
    """Waits, at most so long; raises ClientDisconnectedError if the client goes first."""
    watcher = asyncio.create_task(_wait_for_disconnect(request))
    try:
        both: set[asyncio.Future[Any]] = {task, watcher}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if watcher.done() and not task.done():
            raise ClientDisconnectedError
    finally:
        await cancelled(watcher)


async def cancelled(task: asyncio.Future[T]) -> None:
    """Ends a task, if it hasn't ended, without a word about how."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def frames(items: AsyncGenerator[Frame, None], style: StreamStyle) -> AsyncGenerator[Frame, None]:
    """Each frame: the items, and the last ones, which say so if an error is raised after the first item."""
    started = False
    last = style.last
    try:
        async for item in items:
            yield _escaped(item) if isinstance(item, str) else item
            started = True
    except Exception as error:
        if not started:
            raise
        last = style.failure(told(error))
    finally:
        await items.aclose()
    for frame in last:
        yield frame


def _escaped(data: str) -> str:
    return data if data.isascii() else LINE_ENDS.sub(_escape, data)


def _escape(character: re.Match[str]) -> str:
    return f"\\u{ord(character[0]):04x}"


def told(error: Exception) -> ApiError:
    """What the client is told of an error."""
    if isinstance(error, ApiError):
        return error
    logger.error("a stream failed", exc_info=error)
    return EngineFailureError()


def encoded(frame: Frame) -> bytes:
    """A frame as it is sent. Text is JSON, which has no line breaks, or DONE."""
    return f"data: {frame}\n\n".encode() if isinstance(frame, str) else frame.encode()


class StreamResponse(EventSourceResponse):
    """Sends frames, and calls `on_close` when that is over, for whatever reason.

    `first` is the first frame, perhaps still to come, in which case its failure is an error frame;
    `quiet_since` is when the client last heard of us (time.monotonic).
    """

    def __init__(
        self,
        first: asyncio.Future[Frame],
        rest: AsyncIterator[Frame],
        on_close: Callable[[], None],
        style: StreamStyle,
        *,
        shutdown_grace_period: float,
        ping_seconds: float,
        send_timeout: float = SEND_TIMEOUT,
        quiet_since: float | None = None,
    ) -> None:
        super().__init__(
            self._frames(rest),
            sep="\n",  # the default, CRLF, breaks clients that split at "\n\n"
            send_timeout=send_timeout,
            # The library cancels streams when a signal arrives; the server ends them in its own time.
            shutdown_grace_period=shutdown_grace_period,
        )
        del self.headers["connection"]  # the server's business: it may have to say "close"
        self._first = first
        self._on_close = on_close
        self._style = style
        self._ping_seconds = ping_seconds
        self._quiet_since = time.monotonic() if quiet_since is None else quiet_since
        self._send_timeout = send_timeout
        self._sending_since: float | None = None
        self._is_pause = False  # a comment was the last that was sent

    def follow_pause(self) -> None:
        """Lets the stream begin as behind a comment, since one was the last that was sent."""
        self._is_pause = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the response."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.warning("a client took nothing for %.0f seconds and was dropped", self._send_timeout)
        finally:
            # Not in a generator: one that never started never runs its finally.
            self._first.cancel()
            self._on_close()

    async def _frames(self, rest: AsyncIterator[Frame]) -> AsyncIterator[bytes]:
        async for frame in self._begin(rest):
            self._sending_since = time.monotonic()
            if self._is_pause and self._style.filler is not None:
                yield encoded(self._style.filler())
            self._is_pause = False
            yield encoded(frame)
            self._sending_since = None
            self._quiet_since = time.monotonic()

    async def _begin(self, rest: AsyncIterator[Frame]) -> AsyncIterator[Frame]:
        try:
            first = await self._first
        except Exception as error:
            for frame in self._style.failure(told(error)):
                yield frame
            return
        yield first
        async for data in rest:
            yield data

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Sends a frame, watched by `_ping`: a clock for each, as the library has it, takes long to set."""
        await send(message)

    async def _ping(self, send: Send) -> None:
        """A sign of life after a silence. (The library's own come however busy a stream is.)

        Raises SendTimeoutError when the client doesn't take a frame.
        """
        while self.active:
            now = time.monotonic()
            if self._sending_since is not None and now >= self._sending_since + self._send_timeout:
                raise SendTimeoutError
            pause = self._quiet_since + self._ping_seconds - now
            if pause > 0 or self._sending_since is not None:
                await anyio.sleep(min(max(pause, self._ping_seconds / 10), self._send_timeout))
                continue
            self._is_pause = True
            self._quiet_since = now
            message = {"type": "http.response.body", "body": self._style.ping, "more_body": True}
            async with self._send_lock:
                if self.active:
                    await super()._send_with_timeout(send, message)


async def stream_response(
    request: Request,
    items: AsyncGenerator[Frame, None],
    on_close: Callable[[], None],
    style: StreamStyle,
    *,
    shutdown_grace_period: float,
    ping_seconds: float,
) -> StreamResponse:
    """Waits `ping_seconds` for the first item, then answers. Raises what `items` raises within that time."""
    began = time.monotonic()
    data = frames(items, style)
    first = asyncio.ensure_future(anext(data))
    try:
        await until_done(first, request, ping_seconds)
        if first.done():
            first.result()
    except BaseException:
        await cancelled(first)
        raise
    return StreamResponse(
        first,
        data,
        on_close,
        style,
        shutdown_grace_period=shutdown_grace_period,
        ping_seconds=ping_seconds,
        quiet_since=began,
    )
