"""`speed serve`: the engine in its own process, the application, and uvicorn around it.

Invariant: at the first signal nothing new is accepted, running requests get `shutdown_timeout` seconds,
and what is left then ends with finish reason "abort"; at the second signal everything ends at once.
"""

import asyncio
import socket
import ssl
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from model.worker import EngineOptions, EngineProcess
from server.app import create_app
from server.batcher import RequestBatcher
from server.chat_template import load_chat_template
from server.defaults import NO_DEFAULTS, load_defaults
from server.logs import configure_logging
from server.settings import Settings, SettingsError
from server.tokenizer import load_codec

LOAD_FAILED = 2  # exit status, that of any other option that cannot work
FINAL_FRAMES_TIMEOUT = 3  # seconds for aborted requests to be answered


class DrainingServer(uvicorn.Server):
    """uvicorn, but with answers (503) instead of refused connections while requests finish."""

    def __init__(self, config: uvicorn.Config, batcher: RequestBatcher, drain_timeout: float) -> None:
        super().__init__(config)
        self._batcher = batcher
        self._drain_timeout = drain_timeout

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn itself ends at once only at a second SIGINT."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains, then shuts down."""
        self._batcher.drain()
        deadline = time.monotonic() + self._drain_timeout
        while self._batcher.num_in_flight and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._batcher.abort_all()
        await super().shutdown(sockets)


class EngineServer(DrainingServer):
    """Gives up when the model cannot be loaded: waiting would not help."""

    def __init__(
        self, config: uvicorn.Config, batcher: RequestBatcher, drain_timeout: float, engine: EngineProcess
    ) -> None:
        super().__init__(config, batcher, drain_timeout)
        self._engine = engine
        self.load_failure: str | None = None

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the server."""
        if self._engine.load_failed.is_set():
            self.load_failure = self._engine.health().reason
            return True
        return await super().on_tick(counter)


def engine_options(settings: Settings) -> EngineOptions:
    """The part of the settings that is the engine's."""
    return EngineOptions(
        model_path=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        generation_config=settings.generation_config == "auto",
        draft_depths=settings.draft_depths,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        prefill_chunk_size=settings.prefill_chunk_size,
        draft_policy=settings.draft_policy,
        row_budget=None if settings.row_budget == "auto" else settings.row_budget,
        prefix_caching=settings.prefix_caching,
        kv_cache_tokens=settings.kv_cache_tokens,
        kv_cache_memory=settings.kv_cache_memory,
        threads=settings.threads,
        deterministic=settings.deterministic,
    )


def serve(settings: Settings) -> int:
    """Serves until a signal arrives; returns the exit status."""
    configure_logging(settings)
    check_certificate(settings)
    folder = Path(settings.model)
    template = load_chat_template(folder, settings.chat_template)
    defaults = load_defaults(folder) if settings.generation_config == "auto" else NO_DEFAULTS
    engine = EngineProcess(engine_options(settings))
    app = create_app(engine, load_codec(folder), settings, template, defaults)
    config = uvicorn_config(app, settings)
    server = EngineServer(config, app.state.server.batcher, settings.shutdown_timeout, engine)
    server.run()
    if server.load_failure is None:
        return 0
    print(f"speed: error: the model cannot be loaded: {server.load_failure}", file=sys.stderr)
    return LOAD_FAILED


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
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,  # ours has request ids, and no query strings
        ws="none",
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_keyfile_password=settings.ssl_keyfile_password,
        timeout_keep_alive=settings.keep_alive,
        timeout_graceful_shutdown=FINAL_FRAMES_TIMEOUT,
    )
