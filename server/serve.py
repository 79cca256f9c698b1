"""`speed serve`: each engine in its own process, the application, and uvicorn around it.

Invariants: the address is taken before the model loads, so that a port in use is known at once; at the first
SIGTERM or SIGINT nothing new is accepted, running requests get `shutdown_timeout` seconds, what is left then
ends with finish reason "abort", and the exit status is 0; at the second one everything ends at once; SIGHUP
ends nothing.
"""

import asyncio
import logging
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Protocol, cast

import uvicorn
from fastapi import FastAPI

from model.options import WorkerOptions
from model.protocol import EngineHealth
from model.worker import EngineProcess, Patience
from server.announcer import Announcer
from server.app import create_app_of
from server.connections import BoundedProtocol, ConnectionLimits, Crowd
from server.listening import bound, open_connections, url_of
from server.logs import configure_logging
from server.served import ModelSource, model_source
from server.settings import Settings, SettingsError, check_variables

logger = logging.getLogger(__name__)

LOAD_FAILED = 2  # exit status, that of any other option that cannot work
ENGINE_FAILED = 1  # exit status when the engine died, or could not be started, again and again
CUT_OFF = 1  # exit status when a second signal ended what was running
FINAL_FRAMES_TIMEOUT = 3  # seconds for aborted requests to be answered


class Work(Protocol):
    """What a server has to finish before it ends."""

    @property
    def num_in_flight(self) -> int:
        """Sequences that have not ended."""

    def drain(self) -> None:
        """Accepts nothing from now on; what runs goes on."""

    def abort_all(self) -> None:
        """Ends all that runs."""


class Watched(Protocol):
    """What a server can't do without."""

    def health(self) -> EngineHealth:
        """Its present state; "dead" ends the server."""


class DrainingServer(uvicorn.Server):
    """uvicorn, but with answers (503) instead of refused connections while requests finish."""

    def __init__(self, config: uvicorn.Config, work: Work, drain_timeout: float) -> None:
        super().__init__(config)
        self._work = work
        self._drain_timeout = drain_timeout

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's own raises the signals again at the end: a status that isn't 0, a traceback at Ctrl-C."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Callable[[int, FrameType | None], Any]] = {
            signal.SIGINT: self.handle_exit,
            signal.SIGTERM: self.handle_exit,
        }
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            handlers[signal.SIGHUP] = self._handle_hangup
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """Sent when a terminal closes, and by those who wish that a server reads its files again."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn itself ends at once only at a second SIGINT."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains, then shuts down."""
        self._work.drain()
        deadline = time.monotonic() + self._drain_timeout
        while self._work.num_in_flight and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._work.abort_all()
        await super().shutdown(sockets)


class EngineServer(DrainingServer):
    """Ends when the engine is given up: waiting would not help."""

    def __init__(
        self,
        config: uvicorn.Config,
        work: Work,
        drain_timeout: float,
        engine: Watched,
        announcer: Announcer,
    ) -> None:
        super().__init__(config, work, drain_timeout)
        self._engine = engine
        self._announcer = announcer
        self._failure: int | None = None

    @property
    def exit_status(self) -> int:
        """The exit status of the process, when this server has ended."""
        if self._failure is not None:
            return self._failure
        return CUT_OFF if self.force_exit else 0

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the server."""
        health = self._engine.health()
        if health.state == "dead":
            self._failure = _report_failure(health)
            return True
        self._announcer.tick(health)
        return await super().on_tick(counter)


def _report_failure(health: EngineHealth) -> int:
    """One line for whoever started the server; the exit status."""
    what = "the model cannot be loaded" if health.load_failed else "the engine is given up"
    print(f"speed: error: {what}: {health.reason}", file=sys.stderr)
    return LOAD_FAILED if health.load_failed else ENGINE_FAILED


def worker_options(settings: Settings) -> WorkerOptions:
    """The part of the settings that is the engine's: what is called the same means the same."""
    names = set(WorkerOptions.__struct_fields__) & set(Settings.model_fields)
    given = {name: getattr(settings, name) for name in names}
    given["row_budget"] = None if settings.row_budget == "auto" else settings.row_budget
    given["generation_config"] = settings.generation_config == "auto"
    return WorkerOptions(model_path=settings.model, cache_sharers=settings.max_loaded or 1, **given)


def serve(models: Sequence[Settings], *, starts_first: bool = True) -> int:
    """Serves until a signal arrives; returns the exit status. Raises SettingsError.

    One entry for each model, alike in what is of the server; `starts_first`: the first is loaded at once.
    """
    settings = models[0]
    configure_logging(settings)
    check_certificate(settings)
    check_variables()
    with bound(settings.host, settings.port) as sockets:
        server = engine_server(models, url_of(settings, sockets[0]), starts_first=starts_first)
        server.run(sockets)
    return server.exit_status


def engine_server(models: Sequence[Settings], url: str, *, starts_first: bool = True) -> EngineServer:
    """The server of these models, to be run with sockets of that address."""
    settings = models[0]
    app = create_app_of([_own_model(each) for each in models], starts_first=starts_first)
    config = uvicorn_config(app, settings)
    first, *others = [each.model_names[0] for each in models]
    announcer = Announcer(first if starts_first else ", ".join([first, *others]), url)
    announcer.warn(settings)
    if starts_first and others:
        logger.info("loaded by the first request for it: %s", ", ".join(others))
    served = app.state.server
    return EngineServer(config, served, settings.shutdown_timeout, served, announcer)


def _own_model(settings: Settings) -> ModelSource:
    """A model whose engines are processes of ours; raises SettingsError for a file that can't be used."""
    options = worker_options(settings)
    return model_source(settings, lambda: engine_process(settings, options))


def engine_process(settings: Settings, options: WorkerOptions) -> EngineProcess:
    """An engine that waits as long for its process as the settings say."""
    patience = Patience(silence=settings.worker_timeout, loading=settings.load_timeout)
    return EngineProcess(options, patience, has_standby=settings.standby_engine)


def connection_limits(settings: Settings) -> ConnectionLimits:
    """What clients may take; raises SettingsError if the system allows less."""
    return ConnectionLimits(
        max_connections=open_connections(settings.max_connections),
        max_header_bytes=settings.max_header_bytes,
        max_header_count=settings.max_header_count,
        request_timeout=settings.request_timeout,
    )


def check_certificate(settings: Settings) -> None:
    """Raises SettingsError unless the TLS files, if any are named, can be used together."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise SettingsError("--ssl-keyfile needs --ssl-certfile")
        return
    # An empty password, lest the library ask for one on the terminal.
    password = settings.ssl_keyfile_password or ""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password)
    except OSError as error:  # SSLError is one
        files = f"--ssl-certfile {settings.ssl_certfile}, --ssl-keyfile {settings.ssl_keyfile}"
        raise SettingsError(f"{files}: {error.strerror or error}") from None


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs the application; raises SettingsError."""
    crowd = Crowd(connection_limits(settings))
    # What it says at level info ("running" long before anything is served) is said by the announcer.
    log_level = "warning" if settings.log_level == "info" else settings.log_level
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=log_level,
        http=cast(type[asyncio.Protocol], partial(BoundedProtocol, crowd=crowd)),
        access_log=False,  # ours has request ids, and no query strings
        ws="none",
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_keyfile_password=settings.ssl_keyfile_password,
        timeout_keep_alive=settings.keep_alive,
        timeout_graceful_shutdown=FINAL_FRAMES_TIMEOUT,
    )
