"""The engine in a process of its own: messages over local sockets, crash and restart.

Two halves. `EngineProcess` lives in the API process, never imports torch and satisfies
`protocol.Engine`; `main` is the worker, started as `python -m model.worker`. Requests go one way and
events the other, as MessagePack over ZeroMQ pipes in a private folder. Invariants: every accepted
request gets its one terminal event even if the worker dies; a worker never outlives its parent (its
standard input is a pipe that the parent holds open).
"""

import asyncio
import logging
import os
import signal
import sys
import tempfile
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from time import monotonic
from typing import NoReturn

import msgspec
import zmq
import zmq.asyncio

from model.protocol import (
    EngineHealth,
    EngineInfo,
    EngineStats,
    EngineUnavailableError,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 5.0  # a worker that takes longer to end is killed
STATS_SECONDS = 0.5  # between two reports of the counts while there is work
LOAD_FAILURE_EXIT = 2


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker needs to load a model. None and 0 mean: choose for me."""

    model_path: str
    device: str = "auto"  # auto, cpu, cuda, cuda:i
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantization: str = "auto"  # auto, none, int8
    generation_config: bool = True  # whether generation_config.json names ending tokens
    draft_depths: tuple[int, ...] | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    prefill_chunk_size: int = 64
    row_budget: int | None = None  # rows a pass; None: by measured pass times
    draft_policy: str = "adaptive"
    prefix_caching: bool = True
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None  # bytes
    threads: int = 0
    deterministic: bool | None = None  # batch-invariant arithmetic; CPU, float32 and bfloat16


class Submit(msgspec.Struct, frozen=True, tag=True):
    """API -> worker: continue this."""

    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """API -> worker: end this early."""

    request_id: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker -> API: the model is loaded."""

    info: EngineInfo


class Events(msgspec.Struct, frozen=True, tag=True):
    """Worker -> API: what a pass brought, and now and then what has been done in all."""

    events: list[TokenEvent]
    stats: EngineStats | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker -> API: the last words of a worker."""

    reason: str


class EngineProcess:
    """Starts, watches and restarts the worker; one event loop, one reader of `events`."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.num_restarts = 0
        self._health = EngineHealth(state="loading", reason="the model is loading")
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._in_flight: set[str] = set()
        self._queue: asyncio.Queue[list[TokenEvent] | None] = asyncio.Queue()
        self._link: _Link | None = None
        self._closing = False
        self._supervisor: asyncio.Task[None] | None = None
        self.load_failed = asyncio.Event()  # set when the first load fails: there is nothing to serve

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
        self._in_flight.add(request.request_id)
        self._link.send(Submit(request))

    def abort(self, request_id: str) -> None:
        """See protocol.Engine."""
        if request_id in self._in_flight and self._link is not None:
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
        self._closing = True
        if self._link is not None:
            await self._link.end()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._finish_all("abort", None)
        self._health = EngineHealth(state="dead", reason="the server is shutting down")
        self._queue.put_nowait(None)

    async def _supervise(self) -> None:
        """Runs workers one after the other; gives up when one cannot load."""
        while not self._closing:
            was_ready = await self._run_worker()
            if self._closing:
                return
            reason = self._health.reason
            self._finish_all("error", reason)
            if not was_ready:
                self._health = EngineHealth(state="dead", reason=reason)
                self.load_failed.set()
                return
            log.error("engine worker died (%s); starting another", reason)
            self.num_restarts += 1

    async def _run_worker(self) -> bool:
        """One worker from start to end; whether it was ever ready. Leaves the reason in `_health`."""
        self._info = None
        self._stats = EngineStats()
        self._health = EngineHealth(state="loading", reason="the model is loading")
        self._link = await _Link.open(self.options)
        was_ready, last_words = False, ""
        try:
            async for message in self._link.messages(self._worker_ended):
                if isinstance(message, Ready):
                    was_ready = True
                    self._info = message.info
                    self._health = EngineHealth(state="ready")
                    log.info(_capacity(message.info))
                elif isinstance(message, Events):
                    self._stats = message.stats or self._stats
                    self._deliver(message.events)
                else:
                    last_words = message.reason
        finally:
            code = await self._link.end()
            self._link = None
        reason = last_words or f"the engine process ended with exit code {code}"
        self._health = EngineHealth(state="loading", reason=reason)
        return was_ready

    def _worker_ended(self) -> None:
        """From here on nothing new is taken, though its last messages are still to be read."""
        self._health = EngineHealth(state="loading", reason="the engine process ended")

    def _deliver(self, events: list[TokenEvent]) -> None:
        self._in_flight.difference_update(e.request_id for e in events if e.finish_reason)
        self._queue.put_nowait(events)

    def _finish_all(self, reason: FinishReason, error: str | None) -> None:
        """Answers whatever was in flight when its worker went away."""
        ended = [TokenEvent(request_id=i, finish_reason=reason, error=error) for i in sorted(self._in_flight)]
        self._in_flight.clear()
        if ended:
            self._queue.put_nowait(ended)


class _Link:
    """One worker process and its two sockets."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._folder = folder
        self._context = zmq.asyncio.Context()
        requests, events = _endpoints(folder.name)
        # Sending never waits: a plain socket without a high-water mark, its own I/O thread.
        self._requests: zmq.Socket[bytes] = zmq.Context.shadow(self._context).socket(zmq.PUSH)
        self._events = self._context.socket(zmq.PULL)
        for socket, endpoint in ((self._requests, requests), (self._events, events)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(endpoint)
        self.process: Process
        self._decoder = msgspec.msgpack.Decoder(Ready | Events | Failed)

    @classmethod
    async def open(cls, options: EngineOptions) -> "_Link":
        """Starts a worker; its first message says whether it could load."""
        folder = tempfile.TemporaryDirectory(prefix="speed-")
        link = cls(folder)
        link.process = await asyncio.create_subprocess_exec(
            *_command(folder.name), stdin=PIPE, env=_worker_environment()
        )
        assert link.process.stdin is not None
        link.process.stdin.write(msgspec.json.encode(options) + b"\n")
        return link

    def send(self, message: Submit | Abort) -> None:
        self._requests.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    async def messages(self, on_end: Callable[[], None]) -> AsyncIterator[Ready | Events | Failed]:
        """What the worker says, until it has ended (`on_end` is called) and all it said has been read."""
        ended = asyncio.create_task(self.process.wait())
        ended.add_done_callback(lambda task: None if task.cancelled() else on_end())
        try:
            while not ended.done():
                receive = asyncio.ensure_future(self._events.recv())
                await asyncio.wait({receive, ended}, return_when=asyncio.FIRST_COMPLETED)
                if receive.done():
                    yield self._decoder.decode(receive.result())
                else:
                    receive.cancel()
            while await self._events.poll(timeout=100):
                yield self._decoder.decode(await self._events.recv())
        finally:
            ended.cancel()

    async def end(self) -> int | None:
        """Ends the worker if it still runs, closes the sockets; its exit code. May be called twice."""
        process = self.process
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()  # end of file: the worker leaves
            try:
                await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        if not self._requests.closed:
            self._requests.close()
            self._events.close()
            self._context.term()
            self._folder.cleanup()
        return process.returncode


def _capacity(info: EngineInfo) -> str:
    requests = info.kv_cache_tokens / info.max_model_len
    return (
        f"KV cache: {info.kv_cache_tokens} tokens, {requests:.1f} requests at the full context of "
        f"{info.max_model_len} tokens; draft policy {info.draft_policy}"
    )


def _endpoints(folder: str) -> tuple[str, str]:
    return f"ipc://{folder}/requests", f"ipc://{folder}/events"


def _command(folder: str) -> list[str]:
    # -P: a model.py or model/ in the folder where the user stands must not be taken for this package
    return [sys.executable, "-P", "-m", "model.worker", folder]


def _worker_environment() -> dict[str, str]:
    """The environment with this project's packages importable, wherever the parent was started."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


# ---- the worker's side -------------------------------------------------------------------------


def main() -> NoReturn:
    """Entry point of the worker: loads the model, then serves until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the API process, which ends this one
    options = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineOptions)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    context = zmq.Context()
    requests, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, endpoint in zip((requests, events), _endpoints(sys.argv[1]), strict=True):
        socket.set_hwm(0)
        socket.connect(endpoint)
    code = 1
    try:
        _serve(options, requests, events)
    except Exception as error:
        if isinstance(error, ValueError):  # what a user can mend: one line, no traceback
            code = LOAD_FAILURE_EXIT
        else:
            logging.basicConfig()
            log.exception("engine worker failed")
        events.send(msgspec.msgpack.encode(Failed(f"{type(error).__name__}: {error}")))
    context.destroy(linger=1000)
    sys.stderr.flush()
    os._exit(code)  # the thread that watches standard input would hold up an orderly exit


def _serve(options: EngineOptions, requests: "zmq.Socket[bytes]", events: "zmq.Socket[bytes]") -> None:
    # Here: the API process imports this module and must not import torch.
    from model.serving import build_engine  # noqa: PLC0415

    engine = build_engine(options)
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(Submit | Abort)
    events.send(encoder.encode(Ready(engine.info)))
    next_stats = 0.0
    while True:
        while requests.poll(0 if engine.has_work else None):
            message = decoder.decode(requests.recv())
            if isinstance(message, Submit):
                engine.add(message.request)
            else:
                engine.abort(message.request_id)
        new = engine.step()
        # Idle counts must arrive too: the last pass of a burst always sends them.
        due = not engine.has_work or monotonic() >= next_stats
        if due:
            next_stats = monotonic() + STATS_SECONDS
        if new or due:
            events.send(encoder.encode(Events(new, engine.stats if due else None)))


def _leave_with_parent() -> None:
    """Ends this process when the parent has closed its end of the pipe, or died."""
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
