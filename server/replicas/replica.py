"""One replica: an engine process, and an answer to each request as an iterator of its events.

Knows nothing about Ray. Invariants: an answer that is left, for whatever reason, has aborted its request; a
replica that can't serve a request says so and takes nothing.
"""

import asyncio
from collections.abc import AsyncGenerator

from model.protocol import EngineClient, EngineInfo, EngineUnavailableError, GenerationRequest
from server.batcher import AdmissionLimits, EventStream, RequestBatcher
from server.engine_counts import LifetimeCounts
from server.errors import UnavailableError
from server.metrics import Metrics
from server.replicas.messages import Answer, Report

# The front admits requests: it knows what all replicas do.
NO_LIMITS = AdmissionLimits(2**31, 2**62)
LOOK_SECONDS = 0.05  # between two looks at an engine that loads
# What a piece of an answer costs Ray and the front. A stream waits that long for each one that runs, so that
# pieces are fewer and longer where there are many.
ANSWER_SECONDS = 0.0005


class EngineDeadError(RuntimeError):
    """The engine is given up; the message says why."""


class Replica:
    """Serves the requests of fronts by one engine."""

    def __init__(self, name: str, engine: EngineClient) -> None:
        self._name = name
        self._engine = engine
        self._counts = LifetimeCounts(engine)
        self._batcher = RequestBatcher(engine, NO_LIMITS, Metrics(engine, name))
        self._streams: dict[str, EventStream] = {}  # by the id of the request

    async def start(self) -> None:
        """Returns when the model is loaded; raises EngineDeadError if it can't be."""
        await self._batcher.start()
        while self._engine.health().state == "loading":
            await asyncio.sleep(LOOK_SECONDS)
        self.check_health()

    async def close(self) -> None:
        """Ends the engine; what still runs ends with "abort"."""
        await self._batcher.close()

    def check_health(self) -> None:
        """Raises EngineDeadError once no further worker will be started."""
        health = self._engine.health()
        if health.state == "dead":
            raise EngineDeadError(health.reason)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Answer, None]:
        """The events of a request until its last one, or one refusal."""
        try:
            stream = self._batcher.open([request])
        except UnavailableError as error:
            yield Answer(replica=self._name, refusal=str(error))
            return
        self._streams[request.request_id] = stream
        try:
            async for event in stream:
                self._counts.update()
                yield Answer(replica=self._name, event=event)
                if event.finish_reason is None:
                    await asyncio.sleep(ANSWER_SECONDS * len(self._streams))
        finally:
            stream.close()
            del self._streams[request.request_id]

    def stop(self, request_id: str) -> None:
        """Ends a request early: its last event still comes. Ids that are unknown are ignored."""
        if request_id in self._streams:
            self._streams[request_id].abort(request_id)

    def report(self) -> Report:
        """How it is, and what it has done."""
        return Report(
            replica=self._name,
            health=self._engine.health(),
            info=self._info(),
            stats=self._counts.total(),
            restarts=dict(self._engine.restarts),
        )

    def _info(self) -> EngineInfo | None:
        try:
            return self._engine.info
        except EngineUnavailableError:
            return None
