"""The asynchronous side of the engine: admission, one mailbox per HTTP request, aborts.

Knows nothing about HTTP, text or JSON. Invariants: a stream that was left, for whatever reason, has
aborted what still ran of it; a stream that is open ends with one last event for each of its requests,
even if the engine goes silent for ever; a mailbox holds at most one event per request, because a
reader that is slow finds the deltas merged.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Self

import msgspec

from model.protocol import (
    Engine,
    EngineInfo,
    EngineUnavailableError,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from server.errors import QueueFullError, UnavailableError

logger = logging.getLogger(__name__)
CLOSE_TIMEOUT = 2.0  # seconds for the last events of a closed engine to arrive


def merge_events(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """One event that says what two consecutive ones of a request said. Takes the lists of `first`.

    Extends them: a reader that is a thousand tokens behind costs a thousand steps, not a million.
    """
    first.token_ids.extend(second.token_ids)
    first.logprobs.extend(second.logprobs)
    return msgspec.structs.replace(
        second,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        prompt_logprobs=second.prompt_logprobs or first.prompt_logprobs,
    )


class EventStream:
    """The events of a few sequences, as an asynchronous iterator that ends when all have finished.

    Leave it by `close` or as a context manager; sequences that have not finished are aborted then.
    """

    def __init__(self, batcher: "RequestBatcher", request_ids: Sequence[str]) -> None:
        self._batcher = batcher
        self._running = set(request_ids)
        self._mailbox: dict[str, TokenEvent] = {}  # in order of the first unread token
        self._news = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Adds an event without waiting."""
        waiting = self._mailbox.get(event.request_id)
        self._mailbox[event.request_id] = merge_events(waiting, event) if waiting else event
        if event.finish_reason is not None:
            self._running.discard(event.request_id)
        self._news.set()

    def abort(self, request_id: str) -> None:
        """Ends one sequence early; its last event still arrives, with what it cost."""
        if request_id in self._running:
            self._batcher.abort(request_id)

    def close(self) -> None:
        """Ends everything that still runs, and drops what was not read. May be called twice."""
        for request_id in self._running:
            self._batcher.abandon(request_id)
        self._running.clear()
        self._mailbox.clear()
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._mailbox:
            if not self._running:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._mailbox.pop(next(iter(self._mailbox)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class RequestBatcher:
    """Gives requests to the engine and its events back to those who wait for them.

    At most `max_queued_requests` sequences are in flight.
    """

    def __init__(self, engine: Engine, max_queued_requests: int) -> None:
        self._engine = engine
        self._streams: dict[str, EventStream] = {}
        self._reader: asyncio.Task[None] | None = None
        self._draining = False
        self.max_queued_requests = max_queued_requests

    @property
    def num_in_flight(self) -> int:
        """Sequences that the engine runs or keeps waiting."""
        return len(self._streams)

    async def start(self) -> None:
        """Starts the engine and reads its events. Call once, in the event loop that serves requests."""
        await self._engine.start()
        self._reader = asyncio.create_task(self._read_events())

    async def close(self) -> None:
        """Ends the engine; whatever still runs ends with "abort"."""
        self._draining = True
        await self._engine.close()
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=CLOSE_TIMEOUT)
            self._reader.cancel()
        self._end_all("abort")

    def drain(self) -> None:
        """Accepts nothing from now on; what runs goes on."""
        self._draining = True

    def abort_all(self) -> None:
        """Ends all that runs; the streams get their last events with finish reason "abort"."""
        for request_id in list(self._streams):
            self._engine.abort(request_id)

    def check_ready(self) -> None:
        """Raises UnavailableError, with the reason, if a request opened now would not be served."""
        if self._draining:
            raise UnavailableError("the server is shutting down", "server_draining")
        health = self._engine.health()
        if health.state == "loading":
            raise UnavailableError("the engine is loading the model", "engine_loading")
        if health.state == "dead" or self._reader is None or self._reader.done():
            raise UnavailableError("the engine is not running", "engine_unavailable")

    def engine_info(self) -> EngineInfo:
        """Facts of the loaded model; raises UnavailableError unless the engine is ready."""
        self.check_ready()
        try:
            return self._engine.info
        except EngineUnavailableError:
            raise UnavailableError("the engine is not ready", "engine_unavailable") from None

    def open(self, requests: Sequence[GenerationRequest]) -> EventStream:
        """Submits all of `requests` or none; the stream must be closed by the caller.

        Raises QueueFullError or UnavailableError.
        """
        self.check_ready()
        if self.num_in_flight + len(requests) > self.max_queued_requests:
            raise QueueFullError(f"{self.num_in_flight} of at most {self.max_queued_requests} are in flight")
        stream = EventStream(self, [request.request_id for request in requests])
        try:
            for request in requests:
                self._engine.submit(request)
                self._streams[request.request_id] = stream
        except EngineUnavailableError:
            stream.close()
            raise UnavailableError("the engine is not ready", "engine_unavailable") from None
        return stream

    def abort(self, request_id: str) -> None:
        """Asks the engine to end a request early."""
        self._engine.abort(request_id)

    def abandon(self, request_id: str) -> None:
        """Ends a request whose events nobody wants any more."""
        if self._streams.pop(request_id, None) is not None:
            self._engine.abort(request_id)

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return  # abandoned: the engine had not seen the abort yet
        if event.finish_reason is not None:
            del self._streams[event.request_id]
        if event.finish_reason == "error":
            logger.error("request %s failed in the engine: %s", event.request_id, event.error)
        stream.put(event)

    async def _read_events(self) -> None:
        try:
            async for events in self._engine.events():
                for event in events:
                    self._deliver(event)
        except Exception:
            logger.exception("the engine's events broke off")
        finally:
            self._end_all("abort" if self._draining else "error")

    def _end_all(self, reason: FinishReason) -> None:
        error = "the engine ended" if reason == "error" else None
        for request_id in list(self._streams):
            self._deliver(TokenEvent(request_id=request_id, finish_reason=reason, error=error))
