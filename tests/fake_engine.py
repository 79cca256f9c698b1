"""An engine without a model: each request gets scripted tokens, and the tests decide when it fails."""

import asyncio
from collections.abc import AsyncIterator, Callable

from model.protocol import (
    EngineHealth,
    EngineInfo,
    EngineState,
    EngineStats,
    EngineUnavailableError,
    GenerationRequest,
    LoopScores,
    RestartReason,
    SequenceStats,
    TokenEvent,
    TokenLogprobs,
    WavePass,
    WaveRecord,
    WaveToken,
)

EOS = 256
INFO = EngineInfo(
    family="fake",
    vocab_size=257,
    max_model_len=200,
    num_loops=4,
    draft_depths=[1, 2],
    draft_policies=["single", "earliest"],
    eos_token_ids=[EOS],
    device="cpu",
    dtype="float32",
    kv_cache_tokens=1000,
    max_num_seqs=8,
)
STATS = SequenceStats(passes=3, rows=9, accepted_drafts=2, rejected_drafts=1, cached_prompt_tokens=1)
Script = Callable[[GenerationRequest], list[int]]


def logprobs_of(token_id: int, position: int, num_top: int) -> TokenLogprobs:
    """Made up, but a function of token and position: the token comes second at even positions."""
    others = [(token_id + 1 + 5 * i) % INFO.vocab_size for i in range(num_top + 1)]
    order = [others[0], token_id, *others[1:]] if position % 2 == 0 else [token_id, *others]
    ranked = [(other, -0.25 * (rank + 1) - position / 64) for rank, other in enumerate(order)]
    rank = order.index(token_id)
    return TokenLogprobs(token_id=token_id, logprob=ranked[rank][1], rank=rank + 1, top=ranked[:num_top])


def loops_of(token_id: int, position: int, num_top: int, gate: float | None = None) -> list[LoopScores]:
    """Made up as well; the last loop's scores are those of `logprobs_of`, and every second one agrees."""
    return [
        LoopScores(logprobs_of(token_id, position + back, num_top), agrees=back % 2 == 0, gate=gate)
        for back in range(INFO.num_loops - 1, -1, -1)
    ]


def wave_of(chunk: list[int], position: int) -> WaveRecord:
    """One pass that made `chunk` final and flushed what the first loop had guessed: byte 0."""
    committed = [WaveToken(token_id, [(1, 0), (INFO.num_loops, token_id)]) for token_id in chunk]
    run = (position - 1, len(chunk), INFO.num_loops)
    return WaveRecord(INFO.num_loops, [WavePass([run], position, committed, [1], (position, 1))])


class FakeEngine:
    """Emits `script(request)` `tokens_per_event` at a time, `delay` seconds apart."""

    def __init__(
        self, script: Script, *, tokens_per_event: int = 1, delay: float = 0.0, info: EngineInfo = INFO
    ) -> None:
        self.script = script
        self.tokens_per_event = tokens_per_event
        self.delay = delay
        self._info = info
        self.state: EngineState = "ready"
        self.restarts: dict[RestartReason, int] = {}
        self.counts = EngineStats()
        self.requests: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self._running: dict[str, asyncio.Task[None]] = {}
        self._events: asyncio.Queue[TokenEvent | Exception | None] = asyncio.Queue()

    @property
    def info(self) -> EngineInfo:
        if self.state != "ready":
            raise EngineUnavailableError(self.state)
        return self._info

    def health(self) -> EngineHealth:
        return EngineHealth(state=self.state)

    def stats(self) -> EngineStats:
        return self.counts

    def submit(self, request: GenerationRequest) -> None:
        if self.state != "ready":
            raise EngineUnavailableError(self.state)
        self.requests.append(request)
        self._running[request.request_id] = asyncio.create_task(self._run(request))

    def abort(self, request_id: str) -> None:
        if request_id in self._running:
            self.aborted.append(request_id)
            self.end(request_id, TokenEvent(request_id=request_id, finish_reason="abort", stats=STATS))

    def end(self, request_id: str, event: TokenEvent) -> None:
        self._running.pop(request_id).cancel()
        self._events.put_nowait(event)

    def fail(self) -> None:
        """The engine's process dies: everything in flight ends with an error."""
        self.state = "dead"
        for request_id in list(self._running):
            self.end(request_id, TokenEvent(request_id=request_id, finish_reason="error", error="secret"))

    def break_off(self, error: Exception | None) -> None:
        """The stream of events ends, or raises, without a word about the requests in flight."""
        self._events.put_nowait(error)

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield [event]

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        for request_id in list(self._running):
            self.abort(request_id)
        self.break_off(None)

    async def _run(self, request: GenerationRequest) -> None:
        if request.prompt_logprobs is not None:
            await asyncio.sleep(self.delay)
            self._events.put_nowait(self._prompt_event(request))
        ids = self.script(request)[: request.max_tokens]
        for start in range(0, len(ids), self.tokens_per_event):
            await asyncio.sleep(self.delay)
            chunk = ids[start : start + self.tokens_per_event]
            self._events.put_nowait(self._event(request, chunk, start + len(chunk)))
        self._running.pop(request.request_id, None)

    def _prompt_event(self, request: GenerationRequest) -> TokenEvent:
        assert request.prompt_logprobs is not None
        entries = [
            logprobs_of(token_id, position, request.prompt_logprobs) if position else None
            for position, token_id in enumerate(request.prompt_token_ids)
        ]
        finished = request.max_tokens == 0
        return TokenEvent(
            request_id=request.request_id,
            prompt_logprobs=entries,
            finish_reason="length" if finished else None,
            stats=STATS if finished else None,
        )

    def _event(self, request: GenerationRequest, chunk: list[int], num_tokens: int) -> TokenEvent:
        stopped = chunk[-1] in {EOS, *request.stop_token_ids}
        finished = stopped or num_tokens == min(request.max_tokens, len(self.script(request)))
        return TokenEvent(
            request_id=request.request_id,
            token_ids=chunk,
            logprobs=[] if request.logprobs is None else self._logprobs(request, chunk, num_tokens),
            finish_reason=("stop" if stopped else "length") if finished else None,
            stop_token_id=chunk[-1] if stopped else None,
            stats=STATS if finished else None,
            wave=wave_of(chunk, self._position(request, num_tokens - len(chunk)))
            if request.include_wave
            else None,
            loop_logprobs=self._loops(request, chunk, num_tokens),
        )

    def _loops(self, request: GenerationRequest, chunk: list[int], end: int) -> list[list[LoopScores]]:
        if request.loop_logprobs is None:
            return []
        start, gate = self._position(request, end - len(chunk)), 0.25 if self._info.has_exit_gate else None
        return [
            loops_of(token_id, start + i, request.loop_logprobs, gate) for i, token_id in enumerate(chunk)
        ]

    def _position(self, request: GenerationRequest, num_tokens: int) -> int:
        return len(request.prompt_token_ids) + num_tokens

    def _logprobs(self, request: GenerationRequest, chunk: list[int], end: int) -> list[TokenLogprobs]:
        assert request.logprobs is not None
        start = self._position(request, end - len(chunk))
        return [logprobs_of(token_id, start + i, request.logprobs) for i, token_id in enumerate(chunk)]
