"""An engine without a model, for what the API process itself costs: tokens at a given rate, no more.

Events travel as the worker's do, MessagePack included; both its sides run here, so that the API process
pays for more than it does beside a real worker.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from time import perf_counter
from types import MappingProxyType

import msgspec

from model.protocol import (
    EngineHealth,
    EngineInfo,
    EngineStats,
    GenerationRequest,
    RestartReason,
    SequenceStats,
    TokenEvent,
    TokenLogprobs,
)
from model.worker import Events


class PacedEngine:
    """Gives `tokens_per_second` to all sequences together, in `passes_per_second` passes.

    What it says is made of `text_ids`.
    """

    restarts: Mapping[RestartReason, int] = MappingProxyType({})

    def __init__(self, text_ids: Sequence[int], tokens_per_second: float, passes_per_second: float) -> None:
        self._text_ids = text_ids
        self._rate = tokens_per_second
        self._period = 1 / passes_per_second
        self._running: dict[str, tuple[GenerationRequest, int]] = {}  # with tokens so far
        self._turns: deque[str] = deque()
        self._closed = asyncio.Event()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Events)
        self._ended: list[TokenEvent] = []

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model; raises EngineUnavailableError while it loads."""
        return EngineInfo(
            family="paced",
            vocab_size=max(self._text_ids) + 1,
            max_model_len=2**20,
            num_loops=4,
            draft_depths=[1],
            eos_token_ids=[0],
            device="cpu",
            dtype="float32",
            kv_cache_tokens=2**30,
            max_num_seqs=2**10,
        )

    def health(self) -> EngineHealth:
        """The present state; never blocks."""
        return EngineHealth(state="ready")

    def stats(self) -> EngineStats:
        """The latest counts; zeros while the model loads."""
        return EngineStats(num_requests_running=len(self._running))

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request without waiting; raises EngineUnavailableError unless the engine is ready."""
        self._running[request.request_id] = (request, 0)
        self._turns.append(request.request_id)

    def abort(self, request_id: str) -> None:
        """Ends a request early; unknown or finished ids are ignored."""
        if self._running.pop(request_id, None):
            event = TokenEvent(request_id=request_id, finish_reason="abort", stats=SequenceStats())
            self._ended.append(event)

    async def start(self) -> None:
        """Begins loading, and returns at once."""

    async def close(self) -> None:
        """Ends the engine; requests in flight get an "abort" event first."""
        self._closed.set()

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        """Batches of events, in order, until the engine is closed."""
        due, next_pass = 0.0, perf_counter()
        while not self._closed.is_set():
            next_pass = max(next_pass + self._period, perf_counter() - 1)  # late passes are made up for
            await asyncio.sleep(max(0.0, next_pass - perf_counter()))
            due = min(due + self._rate * self._period, len(self._running))
            events, self._ended = self._ended, []
            events += [event for event in map(self._next_event, range(int(due))) if event]
            due -= int(due)
            if events:
                yield self._decoder.decode(self._encoder.encode(Events(events))).events

    def _next_event(self, _: int) -> TokenEvent | None:
        """The next token of the sequence whose turn it is; None if that one has gone."""
        request_id = self._turns.popleft()
        if request_id not in self._running:
            return None
        request, count = self._running[request_id]
        token_id = self._text_ids[(count * 7 + len(self._turns)) % len(self._text_ids)]
        finished = count + 1 == request.max_tokens
        if finished:
            del self._running[request_id]
        else:
            self._running[request_id] = (request, count + 1)
            self._turns.append(request_id)
        return TokenEvent(
            request_id=request_id,
            token_ids=[token_id],
            logprobs=[] if request.logprobs is None else [_logprobs(token_id, request.logprobs)],
            finish_reason="length" if finished else None,
            stats=SequenceStats(passes=count + 1) if finished else None,
        )


def _logprobs(token_id: int, count: int) -> TokenLogprobs:
    top = [(token_id + i, -0.5 - i) for i in range(count)]
    return TokenLogprobs(token_id, -0.5, 1, top)
