"""All replicas as one engine: `protocol.EngineClient` for the front.

Knows nothing about Ray: it calls `Replicas`. Invariants: every accepted request gets its one last event,
whatever becomes of its replica; a request that a replica refused, or lost before it said anything, is
given to another one, and never twice to one that refused it; counters never fall.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from model.protocol import (
    EngineHealth,
    EngineInfo,
    EngineStats,
    EngineUnavailableError,
    GenerationRequest,
    RestartReason,
    TokenEvent,
)
from model.schedule.pages import PrefixKeys, prefix_salt
from server.replicas.census import Census
from server.replicas.messages import Answer, ReplicaLostError, Report, Routing

logger = logging.getLogger(__name__)

MOST_PAGES = 512  # of a prompt that decide where it goes
STOP_SECONDS = 5.0  # that a replica gets to end a request in order
POLL_SECONDS = 0.5  # between two rounds of reports
REPORT_SECONDS = 5.0  # for one report to come
MOST_LOSSES = 1  # replicas that one request may lose before it has said anything: it may be what ends them
MOST_ASKED = 1000  # calls of one round


class Replicas(Protocol):
    """The calls to replicas. `routing` decides which one answers."""

    def generate(self, request: GenerationRequest, routing: Routing) -> AsyncGenerator[Answer, None]:
        """What one replica answers; raises ReplicaLostError if it ends meanwhile. Leaving it aborts."""

    async def stop(self, request_id: str, routing: Routing) -> None:
        """Asks a replica to end a request."""

    async def report(self, routing: Routing) -> Report:
        """How one replica is."""


@dataclass
class _Flight:
    """A request that has not ended. `replica` is the one that has begun to answer it, if one has."""

    request: GenerationRequest
    routing: Routing
    replica: str = ""
    num_losses: int = 0
    serving: asyncio.Task[None] | None = field(default=None, repr=False)
    stopping: asyncio.Task[None] | None = field(default=None, repr=False)


class ReplicatedEngine:
    """Sends each request to a replica; one event loop, one reader of `events`."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._census = Census()
        self._flights: dict[str, _Flight] = {}
        self._queue: asyncio.Queue[list[TokenEvent] | None] = asyncio.Queue()
        self._poller: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def info(self) -> EngineInfo:
        """Facts of the model, with places for as many sequences as all replicas have together.

        Raises EngineUnavailableError while no replica is ready.
        """
        info = self._census.info
        if info is None or self._is_closed:
            raise EngineUnavailableError(self.health().reason)
        return info

    def health(self) -> EngineHealth:
        """Ready while one replica is; never dead before it is closed, because Ray starts other replicas."""
        if self._is_closed:
            return EngineHealth(state="dead", reason="the server is shutting down")
        if self._census.info is None:
            return EngineHealth(state="loading", reason="no replica is ready")
        return EngineHealth(state="ready")

    @property
    def restarts(self) -> Mapping[RestartReason, int]:
        """None: `stats` never begins anew, whatever becomes of workers and replicas."""
        return {}

    def stats(self) -> EngineStats:
        """The latest counts of all replicas, with what those did that are gone."""
        return self._census.stats

    def submit(self, request: GenerationRequest) -> None:
        """Sends a request on its way; raises EngineUnavailableError while no replica is ready."""
        routing = _routing(request, self.info, self._census.not_ready)
        flight = self._flights[request.request_id] = _Flight(request, routing)
        # In a context of its own: Ray ends what was called in that of an HTTP request with its client, and
        # nobody would hear what the generation had cost.
        flight.serving = asyncio.get_running_loop().create_task(self._serve(flight), context=Context())

    def abort(self, request_id: str) -> None:
        """Ends a request early; unknown or finished ids are ignored."""
        flight = self._flights.get(request_id)
        if flight is not None and flight.stopping is None:
            flight.stopping = asyncio.get_running_loop().create_task(self._stop(flight), context=Context())

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        """Batches of events, in order, until the engine is closed."""
        while (batch := await self._queue.get()) is not None:
            yield batch

    async def start(self) -> None:
        """Begins to look for replicas, and returns at once."""
        self._poller = asyncio.create_task(self._poll(), name="reports of replicas")

    async def close(self) -> None:
        """Leaves all answers; requests in flight get an "abort" event first. The replicas go on."""
        self._is_closed = True
        flights = list(self._flights.values())
        tasks = [task for each in flights for task in (each.serving, each.stopping)]
        ending = [task for task in [*tasks, self._poller] if task is not None]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        for flight in list(self._flights.values()):  # those that had not begun
            self._end(flight, TokenEvent(request_id=flight.request.request_id, finish_reason="abort"))
        self._queue.put_nowait(None)

    # ---- one request ---------------------------------------------------------------------------

    async def _serve(self, flight: _Flight) -> None:
        """Tells all events of a request."""
        name = flight.request.request_id
        try:
            last = await self._last_event(flight)
        except asyncio.CancelledError:
            last = TokenEvent(request_id=name, finish_reason="abort")
        except Exception as error:
            logger.exception("request %s failed on its way to a replica", name)
            last = _failed(name, f"{type(error).__name__}: {error}")
        self._end(flight, last)

    def _end(self, flight: _Flight, last: TokenEvent) -> None:
        del self._flights[flight.request.request_id]
        self._queue.put_nowait([last])

    async def _last_event(self, flight: _Flight) -> TokenEvent:
        """Tries one replica after the other until one has answered; the last event, which is not told yet."""
        name = flight.request.request_id
        while True:
            try:
                answer = await self._answer(flight)
            except ReplicaLostError as error:
                if flight.replica or flight.num_losses == MOST_LOSSES:
                    return _failed(name, f"the replica ended: {error}")
                flight.num_losses += 1
                continue
            if answer is None:
                return _failed(name, f"the answer of replica {flight.replica} has no end")
            if answer.event is not None:
                return answer.event
            avoid = flight.routing.avoid
            if answer.replica in avoid:  # all others refused it, or there is none
                return _failed(name, f"no replica is ready: {answer.refusal}")
            flight.routing = msgspec.structs.replace(flight.routing, avoid=[*avoid, answer.replica])

    async def _answer(self, flight: _Flight) -> Answer | None:
        """Tells what one replica says, but for its last event or its refusal, which it returns."""
        last = None
        try:
            async with aclosing(self._replicas.generate(flight.request, flight.routing)) as answers:
                async for (
                    answer
                ) in answers:  # to their end: what is left counts as running until Ray knows better
                    flight.replica = answer.replica if answer.event else flight.replica
                    if answer.event is None or answer.event.finish_reason is not None:
                        last = answer
                    else:
                        self._queue.put_nowait([answer.event])
        except ReplicaLostError:
            if last is None:
                raise
        return last

    async def _stop(self, flight: _Flight) -> None:
        """Asks the replica to end a request; leaves the answer where that is of no use."""
        assert flight.serving is not None
        if flight.replica:
            with suppress(ReplicaLostError, TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await self._replicas.stop(flight.request.request_id, Routing(only=flight.replica))
                    await asyncio.wait({flight.serving})
        flight.serving.cancel()

    # ---- all replicas --------------------------------------------------------------------------

    async def _poll(self) -> None:
        """Asks for reports again and again."""
        while True:
            reports: dict[str, Report] = {}
            try:
                is_complete = await self._ask_all(reports)
            except Exception:
                logger.exception("a replica gave no report")
                is_complete = False
            self._census.take(reports, is_complete=is_complete)
            await asyncio.sleep(POLL_SECONDS)

    async def _ask_all(self, reports: dict[str, Report]) -> bool:
        """Adds the report of each replica; whether all were heard.

        A call goes to a replica that was not asked yet, if there is one: when one answers twice, all have.
        """
        for _ in range(MOST_ASKED):
            try:
                async with asyncio.timeout(REPORT_SECONDS):
                    report = await self._replicas.report(Routing(avoid=list(reports)))
            except TimeoutError:
                return False
            except ReplicaLostError:
                continue  # the next call goes to another one
            if report.replica in reports:
                return True
            reports[report.replica] = report
        return False


def _routing(request: GenerationRequest, info: EngineInfo, avoid: list[str]) -> Routing:
    """By the digests that the prefix cache of a replica knows the prompt by."""
    num_pages = min(MOST_PAGES, len(request.prompt_token_ids) // info.kv_page_size)
    salt = prefix_salt(request, request.num_loops or info.num_loops)
    pages = PrefixKeys(salt, info.kv_page_size).upto(request.prompt_token_ids, num_pages)
    return Routing(pages=pages, pages_kept=info.kv_cache_tokens // info.kv_page_size, avoid=avoid)


def _failed(request_id: str, error: str) -> TokenEvent:
    return TokenEvent(request_id=request_id, finish_reason="error", error=error)
