"""The engine as the API process sees it: a worker that is started, watched and replaced.

Satisfies `protocol.EngineClient` and never imports torch. Invariants: every accepted request gets its one
last event, whatever becomes of its worker; the state is never "loading" for ever: each start, each load
and each silence has its limit, and after some failures in a row the engine is given up.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import msgspec

from model.options import WorkerOptions
from model.protocol import (
    EngineHealth,
    EngineInfo,
    EngineStats,
    EngineUnavailableError,
    FinishReason,
    GenerationRequest,
    RestartReason,
    TokenEvent,
)
from model.worker.link import COMMAND, LinkClosedError, WorkerLink
from model.worker.main import LOAD_FAILURE_EXIT
from model.worker.messages import Abort, Events, FromWorker, Loading, MessageError, Ready, Submit
from model.worker.patience import Patience, Problem, Restarts, Watchdog

log = logging.getLogger(__name__)

LOADING = "the engine process starts"
REPORT_SECONDS = 0.5  # for a hung worker to write where it stands
LAST_WORDS_SECONDS = 2.0  # for what a dead worker had sent to be read


@dataclass
class _Life:
    """What is known of one worker, and in the end how it died."""

    was_ready: bool = False
    has_answered: bool = False  # whether a request came to the end that it should
    ready_since: float = 0.0
    problem: Problem | None = None  # why it was killed
    last_words: str = ""
    exit_code: int | None = None

    @property
    def end(self) -> Problem:
        """Why it ended."""
        if self.problem is not None:
            return self.problem
        if self.last_words:
            return Problem("failed", self.last_words)
        return Problem("exited", f"the engine process ended with exit code {self.exit_code}")


class EngineProcess:
    """Starts, watches and restarts the worker; one event loop, one reader of `events`."""

    def __init__(
        self,
        options: WorkerOptions,
        patience: Patience | None = None,
        command: Sequence[str] = COMMAND,
        *,
        has_standby: bool = False,
    ) -> None:
        """`command` starts a worker; the number of its socket's descriptor is added to it.

        `has_standby`: beside a worker that serves, another waits that has imported all it needs.
        """
        self.options = options
        self.restarts: Counter[RestartReason] = Counter()
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
        self._has_standby = has_standby
        self._standby: WorkerLink | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model; raises EngineUnavailableError while it loads."""
        if self._info is None:
            raise EngineUnavailableError(self._health.reason)
        return self._info

    def health(self) -> EngineHealth:
        """The present state; never blocks."""
        return self._health

    def stats(self) -> EngineStats:
        """The latest counts; zeros while the model loads."""
        return self._stats

    @property
    def num_restarts(self) -> int:
        """How often the engine was started again."""
        return self.restarts.total()

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        return self._link.process.pid if self._link else None

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request without waiting; raises EngineUnavailableError unless the engine is ready."""
        if self._health.state != "ready" or self._link is None:
            raise EngineUnavailableError(self._health.reason)
        try:
            self._link.send(Submit(request))
        except LinkClosedError:
            raise EngineUnavailableError("the engine process ended") from None
        self._in_flight.add(request.request_id)

    def abort(self, request_id: str) -> None:
        """Ends a request early; unknown or finished ids are ignored."""
        if request_id in self._in_flight and self._link is not None:
            with suppress(LinkClosedError):  # then it is about to be answered anyway
                self._link.send(Abort(request_id))

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        """Batches of events, in order, until the engine is closed."""
        while (batch := await self._queue.get()) is not None:
            yield batch

    async def start(self) -> None:
        """Begins loading, and returns at once."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def close(self) -> None:
        """Ends the engine; requests in flight get an "abort" event first."""
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
        finally:
            await self._end_standby()

    async def _live_and_die(self, restarts: Restarts) -> bool:
        """One worker and the pause after it; whether there is to be another."""
        life = await self._run_worker()
        end = life.end
        self._finish_all("error", end.text)
        pause = restarts.pause_after(
            was_ready=life.was_ready, has_proved_itself=life.was_ready and self._has_proved_itself(life)
        )
        if life.exit_code == LOAD_FAILURE_EXIT and not restarts.any_loaded:
            self.load_failed = True
            self._give_up(end.text)
            return False
        if pause is None:
            self._give_up(f"{end.text}; {restarts.num_failures} failures in a row")
            return False
        self._health = EngineHealth(state="loading", reason=end.text, num_failures=restarts.num_failures)
        self.restarts[end.reason] += 1
        self._stats = EngineStats()
        log.error(
            "the engine failed (%s); another is started in %g s (failure %d of %d in a row)",
            end.text,
            pause,
            restarts.num_failures,
            restarts.num_attempts,
        )
        await asyncio.sleep(pause)
        return True

    def _give_up(self, reason: str) -> None:
        self._health = EngineHealth(state="dead", reason=reason, load_failed=self.load_failed)
        log.error("the engine is given up: %s", reason)
        self.gave_up.set()

    def _has_proved_itself(self, life: _Life) -> bool:
        lived = asyncio.get_running_loop().time() - life.ready_since
        return life.has_answered or lived >= self._patience.proof

    async def _run_worker(self) -> _Life:
        """One worker from start to end."""
        life = _Life()
        try:
            self._link = link = await self._open()
        except OSError as error:  # descriptors, memory or processes are used up
            life.problem = Problem("not_started", f"the engine process can't be started: {error}")
            return life
        self._health = msgspec.structs.replace(self._health, reason=LOADING)
        watch = asyncio.create_task(self._watch(link, life), name="engine watchdog")
        try:
            await link.listen(partial(self._take, life))
        except MessageError as error:
            life.problem = Problem("not_understood", f"the engine process is not understood: {error}")
            link.kill()
        finally:
            watch.cancel()
            # Nothing new is taken from here on.
            self._health = EngineHealth(state="loading", reason="the engine process ended")
            self._info = self._link = None
            life.exit_code = await link.end()
        return life

    async def _open(self) -> WorkerLink:
        """A worker that loads: the one that stands by if it lives, else a new one. Raises OSError."""
        link, self._standby = self._standby, None
        if link is not None:
            with suppress(LinkClosedError):
                if not link.has_ended:
                    link.send(self.options)
                    return link
            await link.end()
        link = await WorkerLink.open(self._command)
        link.send(self.options)
        return link

    async def _stand_by(self) -> None:
        """Starts the worker that waits for the end of this one. Without it a restart is slower, no more."""
        try:
            self._standby = await WorkerLink.open(self._command)
        except OSError as error:
            log.warning("no engine process stands by: %s", error)
            self._has_standby = False

    async def _end_standby(self) -> None:
        link, self._standby = self._standby, None
        if link is not None:
            await link.end()

    def _take(self, life: _Life, message: FromWorker) -> None:
        """What a worker says changes what is known of it."""
        if isinstance(message, Events):
            self._stats = message.stats or self._stats
            self._deliver(message.events, life)
        elif isinstance(message, Ready):
            life.was_ready, life.ready_since = True, asyncio.get_running_loop().time()
            self._info = message.info
            self.options = msgspec.structs.replace(self.options, prices=message.prices)
            self._health = EngineHealth(state="ready")
            log.info(_capacity(message.info))
        elif isinstance(message, Loading):
            self._health = msgspec.structs.replace(self._health, reason=message.step)
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
        """Ends a worker that hangs, and a link that outlives its worker; keeps another one at hand."""
        watchdog = Watchdog(self._patience)
        while life.problem is None and not link.has_ended:
            if self._has_standby and life.was_ready and self._standby is None:
                await self._stand_by()
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
        f"KV cache: {info.kv_cache_tokens} tokens in {info.kv_cache_dtype}, {requests:.1f} requests at the "
        f"full context of {info.max_model_len} tokens; draft policy {info.draft_policy}, "
        f"speculation {'on' if info.speculation_enabled else 'off'}"
    )
