"""The engine as the API process sees it: a worker that is started, watched and replaced.

Satisfies `protocol.Engine` and never imports torch. Invariants: every accepted request gets its one
last event, whatever becomes of its worker; the state is never "loading" for ever: each start, each load
and each silence has its limit, and after some failures in a row the engine is given up.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from model.options import WorkerOptions
from model.protocol import (
    EngineHealth,
    EngineInfo,
    EngineStats,
    EngineUnavailableError,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from model.worker.link import COMMAND, LinkClosedError, WorkerLink
from model.worker.main import LOAD_FAILURE_EXIT
from model.worker.messages import Abort, Events, FromWorker, MessageError, Ready, Submit
from model.worker.patience import Patience, Restarts, Watchdog

log = logging.getLogger(__name__)

LOADING = "the model is loading"
REPORT_SECONDS = 0.5  # for a hung worker to write where it stands
LAST_WORDS_SECONDS = 2.0  # for what a dead worker had sent to be read


@dataclass
class _Life:
    """What is known of one worker, and in the end how it died."""

    was_ready: bool = False
    has_answered: bool = False  # whether a request came to the end that it should
    ready_since: float = 0.0
    problem: str = ""  # why it was killed
    last_words: str = ""
    exit_code: int | None = None

    @property
    def reason(self) -> str:
        """Why it ended, in words."""
        return self.problem or self.last_words or f"the engine process ended with exit code {self.exit_code}"


class EngineProcess:
    """Starts, watches and restarts the worker; one event loop, one reader of `events`."""

    def __init__(
        self, options: WorkerOptions, patience: Patience | None = None, command: Sequence[str] = COMMAND
    ) -> None:
        """`command` starts a worker; the number of its socket's descriptor is added to it."""
        self.options = options
        self.num_restarts = 0
        self.gave_up = asyncio.Event()  # set when no further worker will be started; `health` says why
        self.load_failed = False  # whether that is because the first load showed what a user can mend
        self._patience = patience or Patience()
        self._command = command
        self._health = EngineHealth(state="loading", reason=LOADING)
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._in_flight: set[str] = set()
        self._queue: asyncio.Queue[list[TokenEvent] | None] = asyncio.Queue()
        self._link: WorkerLink | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """See protocol.Engine."""
        if self._info is None:
            raise EngineUnavailableError(self._health.reason)
        return self._info

    def health(self) -> EngineHealth:
        """See protocol.Engine."""
        return self._health

    def stats(self) -> EngineStats:
        """See protocol.Engine."""
        return self._stats

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        return self._link.process.pid if self._link else None

    def submit(self, request: GenerationRequest) -> None:
        """See protocol.Engine."""
        if self._health.state != "ready" or self._link is None:
            raise EngineUnavailableError(self._health.reason)
        try:
            self._link.send(Submit(request))
        except LinkClosedError:
            raise EngineUnavailableError("the engine process ended") from None
        self._in_flight.add(request.request_id)

    def abort(self, request_id: str) -> None:
        """See protocol.Engine."""
        if request_id in self._in_flight and self._link is not None:
            with suppress(LinkClosedError):  # then it is about to be answered anyway
                self._link.send(Abort(request_id))

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        """See protocol.Engine."""
        while (batch := await self._queue.get()) is not None:
            yield batch

    async def start(self) -> None:
        """See protocol.Engine."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def close(self) -> None:
        """See protocol.Engine."""
        if self._supervisor is not None:
            self._supervisor.cancel()  # which ends the worker
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._finish_all("abort", None)
        self._health = EngineHealth(state="dead", reason="the server is shutting down")
        self._queue.put_nowait(None)

    # ---- one worker after the other ------------------------------------------------------------

    async def _supervise(self) -> None:
        """Runs workers until one fails in a way that another can't mend, or too many have died."""
        restarts = Restarts(self._patience)
        try:
            while await self._live_and_die(restarts):
                pass
        except Exception as error:  # of this module: nobody would ever hear of it
            log.exception("the supervisor of the engine failed")
            self._finish_all("error", "the engine ended")
            self._give_up(f"{type(error).__name__}: {error}")

    async def _live_and_die(self, restarts: Restarts) -> bool:
        """One worker and the pause after it; whether there is to be another."""
        life = await self._run_worker()
        self._finish_all("error", life.reason)
        pause = restarts.pause_after(
            was_ready=life.was_ready, has_proved_itself=life.was_ready and self._has_proved_itself(life)
        )
        if life.exit_code == LOAD_FAILURE_EXIT and not restarts.any_loaded:
            self.load_failed = True
            self._give_up(life.reason)
            return False
        if pause is None:
            self._give_up(f"{life.reason}; {restarts.num_failures} failures in a row")
            return False
        self._health = EngineHealth(state="loading", reason=life.reason, num_failures=restarts.num_failures)
        self.num_restarts += 1
        self._stats = EngineStats()
        log.error(
            "the engine failed (%s); another is started in %g s (failure %d of %d in a row)",
            life.reason,
            pause,
            restarts.num_failures,
            restarts.num_attempts,
        )
        await asyncio.sleep(pause)
        return True

    def _give_up(self, reason: str) -> None:
        self._health = EngineHealth(state="dead", reason=reason)
        log.error("the engine is given up: %s", reason)
        self.gave_up.set()

    def _has_proved_itself(self, life: _Life) -> bool:
        lived = asyncio.get_running_loop().time() - life.ready_since
        return life.has_answered or lived >= self._patience.proof

    async def _run_worker(self) -> _Life:
        """One worker from start to end."""
        life = _Life()
        try:
            self._link = link = await WorkerLink.open(self.options, self._command)
        except OSError as error:  # descriptors, memory or processes are used up
            life.problem = f"the engine process can't be started: {error}"
            return life
        self._health = msgspec.structs.replace(self._health, reason=LOADING)
        watch = asyncio.create_task(self._watch(link, life), name="engine watchdog")
        try:
            async for message in link.messages():
                self._take(message, life)
        except MessageError as error:
            life.problem = f"the engine process is not understood: {error}"
            link.kill()
        finally:
            watch.cancel()
            # Nothing new is taken from here on.
            self._health = EngineHealth(state="loading", reason="the engine process ended")
            self._info = self._link = None
            life.exit_code = await link.end()
        return life

    def _take(self, message: FromWorker, life: _Life) -> None:
        """What a worker says changes what is known of it."""
        if isinstance(message, Events):
            self._stats = message.stats or self._stats
            self._deliver(message.events, life)
        elif isinstance(message, Ready):
            life.was_ready, life.ready_since = True, asyncio.get_running_loop().time()
            self._info = message.info
            self._health = EngineHealth(state="ready")
            log.info(_capacity(message.info))
        else:
            life.last_words = message.reason

    def _deliver(self, events: list[TokenEvent], life: _Life) -> None:
        """Hands on what belongs to a request that has not ended."""
        known = []
        for event in events:
            if event.request_id not in self._in_flight:
                continue
            known.append(event)
            if event.finish_reason is not None:
                self._in_flight.discard(event.request_id)
                life.has_answered |= event.finish_reason in ("stop", "length")
        self._queue.put_nowait(known)  # even nothing: the counts may be new

    async def _watch(self, link: WorkerLink, life: _Life) -> None:
        """Ends a worker that hangs, and a link that outlives its worker."""
        watchdog = Watchdog(self._patience)
        while not life.problem and not link.has_ended:
            await asyncio.sleep(self._patience.tick)
            problem = watchdog.problem(link.num_messages, is_ready=life.was_ready, is_stopped=link.is_stopped)
            if problem is not None:
                life.problem = problem
                link.report()
                await asyncio.sleep(REPORT_SECONDS)
                link.kill()
        # Its socket closes with it, unless a child of it holds that open or not even SIGKILL ends it.
        await asyncio.sleep(LAST_WORDS_SECONDS)
        link.close()

    def _finish_all(self, reason: FinishReason, error: str | None) -> None:
        """Answers whatever was in flight when its worker went away."""
        ended = [TokenEvent(request_id=i, finish_reason=reason, error=error) for i in sorted(self._in_flight)]
        self._in_flight.clear()
        if ended:
            self._queue.put_nowait(ended)


def _capacity(info: EngineInfo) -> str:
    requests = info.kv_cache_tokens / info.max_model_len
    return (
        f"KV cache: {info.kv_cache_tokens} tokens, {requests:.1f} requests at the full context of "
        f"{info.max_model_len} tokens; draft policy {info.draft_policy}, "
        f"speculation {'on' if info.speculation_enabled else 'off'}"
    )
