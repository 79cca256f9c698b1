"""The asynchronous side of the engine: admission, one mailbox per HTTP request, aborts.

Knows nothing about HTTP, text or JSON. Invariants: a stream that was left, for whatever reason, has
aborted what still ran of it; a stream that is open ends with one last event for each of its requests,
even if the engine goes silent for ever; a mailbox holds at most one event per request, because a
reader that is slow finds the deltas merged.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple, Self

import msgspec

from model.protocol import (
    EngineClient,
    EngineHealth,
    EngineInfo,
    EngineUnavailableError,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from server.errors import QueueFullError, UnavailableError
from server.metrics import Metrics, SequenceMeter

logger = logging.getLogger(__name__)
QUEUED_ROUNDS = 8  # what may be in flight by default, in multiples of what the engine runs at once
CLOSE_TIMEOUT = 2.0  # seconds for the last events of a closed engine to arrive


class AdmissionLimits(NamedTuple):
    """What may be in flight: sequences, and tokens that these may grow to, their prompts included.

    `max_tokens` None: by the engine's own numbers.
    """

    max_requests: int
    max_tokens: int | None = None

    def most_tokens(self, info: EngineInfo) -> int:
        """The limit of tokens. A fixed number would be few chats of one model and thousands of another."""
        at_once = max(info.kv_cache_tokens, info.max_num_seqs * info.max_model_len)
        return QUEUED_ROUNDS * at_once if self.max_tokens is None else self.max_tokens


class _InFlight(NamedTuple):
    """One sequence that has not ended."""

    stream: "EventStream"
    meter: SequenceMeter
    num_tokens: int  # at most


def merge_events(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """One event that says what two consecutive ones of a request said. Takes the lists of `first`.

    Extends them: a reader that is a thousand tokens behind costs a thousand steps, not a million.
    """
    first.token_ids.extend(second.token_ids)
    first.logprobs.extend(second.logprobs)
    first.loop_logprobs.extend(second.loop_logprobs)
    return msgspec.structs.replace(
        second,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        loop_logprobs=first.loop_logprobs,
        prompt_logprobs=second.prompt_logprobs or first.prompt_logprobs,
        wave=first.wave.followed_by(second.wave) if first.wave else second.wave,
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
        """Ends one sequence whose text is complete; its last event still arrives, with what it cost."""
        if request_id in self._running:
            self._batcher.stop(request_id)

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

    What is in flight stays within `limits`, but for a request that is alone.
    """

    def __init__(self, engine: EngineClient, limits: AdmissionLimits, metrics: Metrics) -> None:
        self._engine = engine
        self._limits = limits
        self._metrics = metrics
        self._in_flight: dict[str, _InFlight] = {}
        self._num_tokens = 0  # of those
        self._stopped: set[str] = set()  # those that end at a text of ours, not at a token
        self._reader: asyncio.Task[None] | None = None
        self._draining = False

    @property
    def max_queued_requests(self) -> int:
        """How many sequences one request may have."""
        return self._limits.max_requests

    @property
    def num_in_flight(self) -> int:
        """Sequences that the engine runs or keeps waiting."""
        return len(self._in_flight)

    def health(self) -> EngineHealth:
        """The engine's present state."""
        return self._engine.health()

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
        for request_id in list(self._in_flight):
            self._engine.abort(request_id)

    def check_ready(self) -> None:
        """Raises UnavailableError, with the reason, if a request opened now would not be served."""
        if self._draining:
            raise UnavailableError("the server is shutting down", "server_draining")
        health = self._engine.health()
        if health.state == "loading" and health.num_failures:
            tries = f"{health.num_failures} failure{'s' * (health.num_failures > 1)} in a row"
            raise UnavailableError(f"the engine failed and is started again ({tries})", "engine_loading")
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

    def admit(self) -> EngineInfo:
        """Facts of the loaded model, for a request: where there are none, its refusal is counted."""
        try:
            return self.engine_info()
        except UnavailableError as error:
            self._metrics.rejected(str(error.code))
            raise

    def open(self, requests: Sequence[GenerationRequest]) -> EventStream:
        """Submits all of `requests` or none; the stream must be closed by the caller.

        Raises QueueFullError or UnavailableError.
        """
        info = self.admit()
        try:
            self._check_room(requests, info)
        except QueueFullError as error:
            self._metrics.rejected(error.reason)
            raise
        stream = EventStream(self, [request.request_id for request in requests])
        try:
            for request in requests:
                self._submit(request, stream)
        except EngineUnavailableError:
            stream.close()
            raise UnavailableError("the engine is not ready", "engine_unavailable") from None
        return stream

    def stop(self, request_id: str) -> None:
        """Asks the engine to end a sequence whose text is complete."""
        self._stopped.add(request_id)
        self._engine.abort(request_id)

    def abandon(self, request_id: str) -> None:
        """Ends a request whose events nobody wants any more."""
        if request_id in self._in_flight:
            self._remove(request_id).meter.finished(self._reason(request_id, "abort"), None)
            self._engine.abort(request_id)

    def _check_room(self, requests: Sequence[GenerationRequest], info: EngineInfo) -> None:
        limits, num_in_flight = self._limits, self.num_in_flight
        if num_in_flight + len(requests) > limits.max_requests:
            raise QueueFullError(
                f"{num_in_flight} of at most {limits.max_requests} are in flight", "requests"
            )
        num_tokens = sum(map(_most_tokens, requests))
        if num_in_flight and self._num_tokens + num_tokens > limits.most_tokens(info):
            raise QueueFullError(
                f"requests in flight may grow to {self._num_tokens} tokens, this one to {num_tokens}; "
                f"the limit is {limits.most_tokens(info)} together",
                "tokens",
            )

    def _submit(self, request: GenerationRequest, stream: EventStream) -> None:
        self._engine.submit(request)
        num_tokens = _most_tokens(request)
        self._in_flight[request.request_id] = _InFlight(stream, SequenceMeter(self._metrics), num_tokens)
        self._num_tokens += num_tokens

    def _remove(self, request_id: str) -> _InFlight:
        sequence = self._in_flight.pop(request_id)
        self._num_tokens -= sequence.num_tokens
        return sequence

    def _reason(self, request_id: str, reason: FinishReason) -> FinishReason:
        """Why a sequence ended, as its client sees it. Call once, when it has ended."""
        if request_id not in self._stopped:
            return reason
        self._stopped.discard(request_id)
        return "stop"

    def _deliver(self, event: TokenEvent) -> None:
        sequence = self._in_flight.get(event.request_id)
        if sequence is None:
            return  # abandoned: the engine had not seen the abort yet
        if event.token_ids:
            sequence.meter.tokens(len(event.token_ids))
        if event.finish_reason is not None:
            self._remove(event.request_id)
            sequence.meter.finished(self._reason(event.request_id, event.finish_reason), event.stats)
        if event.finish_reason == "error" and not event.is_refusal:
            logger.error("request %s failed in the engine: %s", event.request_id, event.error)
        sequence.stream.put(event)

    async def _read_events(self) -> None:
        try:
            async for events in self._engine.events():
                self._metrics.engine_spoke()
                for event in events:
                    self._deliver(event)
        except Exception:
            logger.exception("the engine's events broke off")
        finally:
            self._end_all("abort" if self._draining else "error")

    def _end_all(self, reason: FinishReason) -> None:
        error = "the engine ended" if reason == "error" else None
        for request_id in list(self._in_flight):
            self._deliver(TokenEvent(request_id=request_id, finish_reason=reason, error=error))


def _most_tokens(request: GenerationRequest) -> int:
    """Tokens that a sequence may grow to."""
    return len(request.prompt_token_ids) + request.max_tokens
