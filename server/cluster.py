"""`serve run server.cluster:app`: the same server with replicas of its engine, on Ray Serve.

Two deployments. `Front` is the application of `speed serve`: HTTP, text, checks, admission. `Engine` is one
engine with its worker process; there are as many as `num_replicas` or `autoscaling_config` say. Ray's proxy
listens, so that options of the network and of TLS are Ray's. Invariants: a replica that ends takes its own
streams with it and no others; no option is dropped silently.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager

import msgspec
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from model.options import WorkerOptions
from model.protocol import EngineClient, GenerationRequest
from server.app import create_app_of
from server.command import local_model
from server.logs import configure_logging
from server.replicas.client import ReplicatedEngine
from server.replicas.messages import Answer, ReplicaLostError, Report, Routing
from server.replicas.options import settings_of
from server.replicas.replica import Replica
from server.replicas.router import PrefixRouter
from server.serve import engine_process, worker_options
from server.served import model_source
from server.settings import Settings

MOST_CALLS = 100_000  # to one front or replica at once; the front's own limits are below and answer with 429
DRAIN_SECONDS = 60.0  # that running requests get when a replica is to end
QUIET = LoggingConfig(enable_access_log=False)  # there is ours, and calls between deployments are many
LOSSES = (RayActorError, RayServeException, TaskCancelledError)


def app(args: Mapping[str, object]) -> serve.Application:
    """The application; `args` are options of `speed serve` by their names. Raises SettingsError.

    One replica unless a configuration says more: beside a scaling of ours `num_replicas` would be ignored.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # where Ray is not running yet
    settings = settings_of(args)
    engine = serve.deployment(
        Engine,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=MOST_CALLS,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        logging_config=QUIET,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
    )
    front = serve.deployment(
        serve.ingress()(Front),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MOST_CALLS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        logging_config=QUIET,
    )
    return front.bind(settings, engine.bind(settings))


class Engine:
    """A replica of the engine. Ray starts another one where this one isn't healthy."""

    # Before a replica counts as there Ray waits for its constructor alone, in the event loop of the calls.
    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        configure_logging(settings)
        local = await asyncio.to_thread(local_model, settings)
        engine = engine_process(local, _own_share(worker_options(local)))
        self._replica = Replica(serve.get_replica_context().replica_id.unique_id, engine)
        await self._replica.start()

    async def generate(self, request: GenerationRequest, routing: Routing) -> AsyncIterator[Answer]:
        """See `Replica.generate`."""
        del routing
        # Closed with this generator, and not when it is collected: that is what aborts the request.
        async with aclosing(self._replica.generate(request)) as answers:
            async for answer in answers:
                yield answer

    async def stop(self, request_id: str, routing: Routing) -> None:
        """See `Replica.stop`."""
        del routing
        self._replica.stop(request_id)

    async def report(self, routing: Routing) -> Report:
        """See `Replica.report`."""
        del routing
        return self._replica.report()

    async def check_health(self) -> None:
        """Called by Ray; raises EngineDeadError."""
        self._replica.check_health()

    async def __del__(self) -> None:
        """Called by Ray when all running requests have ended, or had their time."""
        if hasattr(self, "_replica"):
            await self._replica.close()


def _own_share(options: WorkerOptions) -> WorkerOptions:
    """With as many threads as Ray has given cores to this replica, where none are asked for."""
    cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    return msgspec.structs.replace(options, threads=options.threads or cores)


class Front:
    """The HTTP server. Its limits and its metrics are those of one front."""

    def __init__(self, settings: Settings, engine: DeploymentHandle) -> None:
        configure_logging(settings)
        self._settings = settings
        self._engine = ReplicatedEngine(RayReplicas(engine))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray behind the constructor."""
        return application(self._engine, local_model(self._settings))


def application(engine: EngineClient, settings: Settings) -> FastAPI:
    """The application of `speed serve` around another engine."""
    return create_app_of([model_source(settings, lambda: engine)])


class RayReplicas:
    """The calls of `ReplicatedEngine` through a handle of Ray Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def generate(self, request: GenerationRequest, routing: Routing) -> AsyncGenerator[Answer, None]:
        """What one replica answers; raises ReplicaLostError. Leaving it aborts the request there."""
        response = self._streaming.generate.remote(request, routing=routing)
        try:
            with _losses():
                async for answer in response:
                    yield answer
        finally:
            response.cancel()  # nothing where it has ended

    async def stop(self, request_id: str, routing: Routing) -> None:
        """Asks a replica to end a request; raises ReplicaLostError."""
        with _losses():
            await self._handle.stop.remote(request_id, routing=routing)

    async def report(self, routing: Routing) -> Report:
        """How one replica is; raises ReplicaLostError."""
        with _losses():
            report: Report = await self._handle.report.remote(routing=routing)
        return report


@contextmanager
def _losses() -> Iterator[None]:
    """Errors of Ray that mean that a replica is gone, as ours."""
    try:
        yield
    except LOSSES as error:
        raise ReplicaLostError(str(error).partition("\n")[0]) from None
