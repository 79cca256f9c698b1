"""All models of a server: which one a request means, which are loaded, and which must make way.

The first may be loaded when the server starts. Any other is loaded by the first request that names it, and
unloaded when it has been idle for long, or when another one needs its place. Invariants: at most
`max_loaded` models have a worker, those whose worker is still ending included; a model in use is never
unloaded; what becomes of one model changes nothing for requests to another, but for its place.

What a request meets: while the model that the server starts with is loading, and while an engine that failed
is started again, 503 at once. For a load that requests began, it waits. Where the place for it isn't free
within `PLACE_SECONDS`, 503 with Retry-After.

Whose turn it is: models wait for a place in the order in which they were asked for. One that is idle makes
way at once. Where none is, and the first in line has waited for `TURN_SECONDS`, the one whose turn has ended
first makes way: what it runs goes on to its end, and requests that come later wait for its next turn. A turn
takes `TURN_SECONDS`, or as long as the load before it. So a model's own comes after at most a turn, the rest
of what runs and a load for each one before it in line, and steady traffic to one keeps no other waiting for
ever.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated

from fastapi import Depends, Request

from model.protocol import EngineHealth
from server.announcer import Announcer
from server.batcher import RequestBatcher
from server.errors import ApiError, ModelNotFoundError, QueueFullError, UnavailableError, quote
from server.lanes import Lanes
from server.metrics import MODELS_BUSY, REFUSAL_REASONS, MetricFamilies
from server.served import ModelSource, ServedModel
from server.settings import Settings, SettingsError
from server.state import ServerState

log = logging.getLogger(__name__)

PLACE_SECONDS = 30.0  # that a request waits for a model in use to become idle, so that it can be unloaded
TURN_SECONDS = 10.0  # that a model waits before one in use makes way for it, and that it then serves itself
KEPT_SECONDS = 30.0  # that a model keeps its place in line when those who waited have been refused
RETRY_SECONDS = 30.0  # before a model that failed is tried again
TICK_SECONDS = 0.05  # between two looks at what waits


class Models:
    """The models of one server, in the order in which they were named."""

    def __init__(self, sources: Sequence[ModelSource], *, starts_first: bool = True) -> None:
        """Opens the first model if it is loaded at the start; raises SettingsError if that can't be."""
        self.settings: Settings = sources[0].settings  # of the server; what is of a model, the model has
        self.lanes = Lanes()
        self.created = int(time.time())
        several = len(sources) > 1 or not starts_first
        reasons = (*REFUSAL_REASONS, MODELS_BUSY) if several else REFUSAL_REASONS
        self.families = MetricFamilies(reasons)
        self._models = [ServedModel(source, self.lanes, self.families, self.created) for source in sources]
        self._by_name = {name: model for model in self._models for name in model.names}
        self.load_on_demand = several or self.settings.unload_idle is not None
        self._max_loaded = self.settings.max_loaded or len(sources)
        self._waiting: dict[ServedModel, float] = {}  # for a place, since when; the first come first
        self._tasks: set[asyncio.Task[None]] = set()  # that unload
        self._ticker: asyncio.Task[None] | None = None
        self._draining = False
        self._starts_first = starts_first
        self._is_starting = starts_first  # until the first model has answered for the first time
        if starts_first:
            self._models[0].holds_place = True
            self._models[0].open()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def names(self) -> list[str]:
        """All names that requests may use."""
        return list(self._by_name)

    @property
    def batcher(self) -> RequestBatcher:
        """That of the first model, which must be loaded."""
        state = self._models[0].state
        assert state is not None
        return state.batcher

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, the first one if a request names none; raises ModelNotFoundError."""
        if name is None:
            return self._models[0]
        if name not in self._by_name:
            raise ModelNotFoundError(name)
        return self._by_name[name]

    # ---- from the start of the server to its end --------------------------------------------------

    async def start(self) -> None:
        """Begins to load the first model, if it is to be. Call once, in the loop that serves requests."""
        first = self._models[0].state
        if first is not None:
            await first.batcher.start()
        if self.load_on_demand:
            self._ticker = asyncio.create_task(self._tick_for_ever(), name="models")

    async def close(self) -> None:
        """Ends all engines; whatever still runs ends with "abort"."""
        self.drain()
        tasks = [self._ticker] if self._ticker else []
        loads = [model.loading for model in self._models if model.loading]
        for task in chain(tasks, loads):
            task.cancel()
        await asyncio.gather(*tasks, *loads, *self._tasks, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in self._models))
        self.lanes.close()

    def drain(self) -> None:
        """Accepts nothing from now on; what runs goes on."""
        self._draining = True
        for model in self._models:
            if model.state is not None:
                model.state.batcher.drain()

    @property
    def num_in_flight(self) -> int:
        """Sequences that the engines run or keep waiting."""
        return sum(model.num_in_flight for model in self._models)

    def abort_all(self) -> None:
        """Ends all that runs; the streams get their last events with finish reason "abort"."""
        for model in self._models:
            if model.state is not None:
                model.state.batcher.abort_all()

    # ---- how they are -----------------------------------------------------------------------------

    def check_ready(self) -> None:
        """Raises UnavailableError, with the reason, if no model would be served, perhaps after its load.

        While the first model loads for the first time, its reason alone counts.
        """
        models = self._models[:1] if self._starts() else self._models
        errors = []
        for model in models:
            try:
                self._check_usable(model)
            except UnavailableError as error:
                errors.append(error)
            else:
                return
        raise errors[0]

    def health(self) -> EngineHealth:
        """The state of the model that the server starts with: if that is dead, the server has nothing to do.

        "unloaded" where there is none, or where another load has followed the first.
        """
        first = self._models[0]
        health = first.health()
        is_first_life = self._starts_first and first.num_lives == 1
        can_be_missed = health.state == "dead" and self.load_on_demand and not self._starts()
        return health if is_first_life and not can_be_missed else EngineHealth(state="unloaded")

    def _starts(self) -> bool:
        if self._is_starting and self._models[0].health().state == "ready":
            self._is_starting = False
        return self._is_starting

    def _check_usable(self, model: ServedModel) -> None:
        """Raises UnavailableError for a model to which no request would be served."""
        if self._draining:
            raise UnavailableError("the server is shutting down", "server_draining")
        if model.loading is not None:
            return
        if model.state is not None:
            model.state.batcher.check_ready()
        elif model.failed_at is not None and time.monotonic() - model.failed_at < RETRY_SECONDS:
            raise _failed(model)

    # ---- loading ----------------------------------------------------------------------------------

    def must_wait(self, model: ServedModel) -> bool:
        """Whether a request to `model` waits until it is loaded."""
        return model.state is None or model.loading is not None or model.makes_way

    async def loaded(self, model: ServedModel) -> ServerState:
        """What serves `model`, which is loaded first if need be.

        It must be `used` by the caller. Raises UnavailableError or QueueFullError, which are counted.
        """
        if model.state is not None and not self.must_wait(model):
            return model.state
        try:
            return await self._wait_for(model)
        except UnavailableError as error:
            model.metrics.rejected(str(error.code))
            raise
        except QueueFullError as error:
            model.metrics.rejected(error.reason)
            raise

    async def _wait_for(self, model: ServedModel) -> ServerState:
        self._check_usable(model)
        most = model.source.settings.max_queued_requests
        if model.num_waiting >= most:
            raise QueueFullError(f"{most} requests wait for the model to be loaded, the limit", "requests")
        loading = model.loading
        if loading is None:
            loading = asyncio.create_task(self._load(model), name=f"load {model.name}")
            model.loading = loading
        model.num_waiting += 1
        try:
            # Not cancelled with those who wait: others may follow them.
            done, _ = await asyncio.wait({loading}, timeout=PLACE_SECONDS)
            if not done and model in self._waiting:
                model.expected_until = time.monotonic() + KEPT_SECONDS
                raise UnavailableError(
                    f"{self._max_loaded} models are loaded, as many as may be, and all are in use",
                    MODELS_BUSY,
                )
            ended = await asyncio.shield(loading)
        finally:
            model.num_waiting -= 1
        if isinstance(ended, ApiError):
            raise ended
        return ended

    async def _load(self, model: ServedModel) -> ServerState | ApiError:
        """Loads `model` when there is a place for it."""
        try:
            await self._take_place(model)
            return model.state or await self._open(model)
        except UnavailableError as error:
            return error
        except Exception as error:
            level = logging.ERROR if isinstance(error, SettingsError) else logging.CRITICAL
            log.log(level, "%s cannot be loaded: %s", model.name, error, exc_info=level == logging.CRITICAL)
            await self._fail(model)
            return _failed(model)
        finally:
            model.loading = None

    async def _open(self, model: ServedModel) -> ServerState:
        """Raises SettingsError or UnavailableError for a model that can't be loaded."""
        announcer, began = Announcer(model.name), time.monotonic()
        announcer.tick(EngineHealth(state="loading", reason="reading the tokenizer"))
        # In a thread of its own: some take seconds.
        state = model.open(await asyncio.to_thread(model.source.load_codec))
        await state.batcher.start()
        while (health := model.health()).state == "loading":
            self._check_not_draining()
            announcer.tick(health)
            await asyncio.sleep(TICK_SECONDS)
        self._check_not_draining()
        if health.state == "dead":
            log.error("%s cannot be loaded: %s", model.name, health.reason)
            await self._fail(model)
            raise _failed(model)
        announcer.tick(health)
        now = time.monotonic()
        model.turn_ends = now + max(TURN_SECONDS, now - began)  # lest more time go into loads than into turns
        return state

    def _check_not_draining(self) -> None:
        if self._draining:
            raise UnavailableError("the server is shutting down", "server_draining")

    async def _fail(self, model: ServedModel) -> None:
        model.failed_at = time.monotonic()
        await model.close()

    async def _take_place(self, model: ServedModel) -> None:
        """Waits until `model` may have a worker; raises UnavailableError."""
        self._waiting[model] = time.monotonic()
        try:
            while not self._has_place(model):
                self._check_not_draining()
                if not model.num_waiting and time.monotonic() >= model.expected_until:
                    raise UnavailableError("nobody waits for the model any more", MODELS_BUSY)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            del self._waiting[model]
            if not self._waiting:
                for other in self._models:
                    other.makes_way = False

    def _has_place(self, model: ServedModel) -> bool:
        """Takes a place for `model`, or sees to it that there will be one if that can be."""
        if next(iter(self._waiting)) is not model:
            return False  # another one was first
        if model.state is not None:
            model.makes_way = False  # it still has the place that nobody else wants any more
            return True
        holders = [other for other in self._models if other.holds_place]
        if len(holders) < self._max_loaded and not model.holds_place:
            model.holds_place = True
            return True
        if not self._tasks:  # else one is ending already, which may be the last worker of `model`
            self._make_room(model, holders)
        return False

    def _make_room(self, model: ServedModel, holders: Sequence[ServedModel]) -> None:
        """Unloads one that is idle, or has one in use take no more requests if it is time for that."""
        idle = [other for other in holders if other.is_idle]
        if idle:
            longest = min(idle, key=lambda other: other.last_used)
            self._unload(longest, f"{model.name} needs its place")
            return
        now = time.monotonic()
        if now < self._waiting[model] + TURN_SECONDS or any(other.makes_way for other in holders):
            return
        ready = [other for other in holders if other.status == "ready" and other.turn_ends <= now]
        if ready:
            oldest = min(ready, key=lambda other: other.turn_ends)
            oldest.makes_way = True
            log.info("%s takes no more requests: %s waits for its place", oldest.name, model.name)

    # ---- unloading --------------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        while True:
            self._tick()
            await asyncio.sleep(TICK_SECONDS)

    def _tick(self) -> None:
        """Unloads what has been idle for long, and what has died."""
        now, limit, starts = time.monotonic(), self.settings.unload_idle, self._starts()
        for model in self._models:
            if model.state is None or model.loading is not None:
                continue
            if model.health().state == "dead" and not starts:
                model.failed_at = now
                self._unload(model, "its engine is given up")
            elif not model.is_idle:
                model.last_used = now
            elif limit is not None and now - model.last_used >= limit:
                self._unload(model, f"idle for {limit:g} s")

    def _unload(self, model: ServedModel, why: str) -> None:
        log.info("%s is unloaded: %s", model.name, why)
        task = asyncio.create_task(model.close(), name=f"unload {model.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _failed(model: ServedModel) -> UnavailableError:
    return UnavailableError(
        f"the model {quote(model.name)} could not be loaded, or failed; it is tried again later",
        "engine_unavailable",
    )


def all_models(request: Request) -> Models:
    """The models of the server that `request` came to."""
    models = request.app.state.server
    assert isinstance(models, Models)
    return models


AllModels = Annotated[Models, Depends(all_models)]
