"""A real engine in the process and the event loop of the test: `protocol.EngineClient` without a worker."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType

from model.engine import Engine
from model.protocol import EngineHealth, EngineInfo, EngineStats, GenerationRequest, RestartReason, TokenEvent


class LocalEngine:
    """Steps the engine whenever events are read; requests that came meanwhile join at the next pass."""

    restarts: Mapping[RestartReason, int] = MappingProxyType({})

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def health(self) -> EngineHealth:
        return EngineHealth(state="ready")

    def stats(self) -> EngineStats:
        return self.engine.stats

    def submit(self, request: GenerationRequest) -> None:
        self.engine.add(request)

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        while not self._closed:
            if events := self.engine.step() if self.engine.has_work else []:
                yield events
            await asyncio.sleep(0 if self.engine.has_work else 0.002)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self._closed = True
