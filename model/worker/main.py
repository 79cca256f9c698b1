"""The worker: loads a model, then serves the requests that come over its socket until that is closed.

Invariants: it outlives its parent by no more than a moment, whatever it is doing; while the parent lives no
signal but SIGKILL ends it, since it is the parent that lets running requests finish; the engine's own
loop says something at least every `BEAT_SECONDS` and after every pass, so that silence means a stuck
engine (a thread that sends heartbeats would go on while the engine hangs).
"""

import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from time import monotonic
from typing import NoReturn

from msgspec.msgpack import Decoder

from model.options import LOG_FORMAT, WorkerOptions
from model.worker.messages import (
    Abort,
    Events,
    Failed,
    FromWorker,
    Loading,
    Ready,
    Submit,
    ToWorker,
    Unpacker,
    pack,
)

log = logging.getLogger(__name__)

LOAD_FAILURE_EXIT = 2  # exit status where a user can mend what is wrong
BEAT_SECONDS = 1.0  # between two signs of life of an idle engine
STATS_SECONDS = 0.5  # between two reports of the counts while there is work
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # sent to the whole group, meant for it
REPORT_SIGNAL = signal.SIGUSR1  # makes the worker write where it stands to stderr
READ_BYTES = 2**18


def main() -> NoReturn:
    """Entry point of the process; its argument is the descriptor of the socket."""
    ignore_parents_signals()
    logging.basicConfig(format=LOG_FORMAT)
    faulthandler.register(REPORT_SIGNAL)
    channel = Channel(int(sys.argv[1]))
    threading.Thread(target=channel.leave_at_its_end, daemon=True).start()
    code = 1
    try:
        serve(channel)
    except Exception as error:
        # First of all the message: with a full disk behind stderr the log may raise.
        channel.send(Failed(f"{type(error).__name__}: {error}"))
        if isinstance(error, ValueError):  # what a user can mend: one line, no traceback
            code = LOAD_FAILURE_EXIT
        else:
            log.exception("engine worker failed")
    finally:
        os._exit(code)  # an orderly exit would wait for threads of libraries


def ignore_parents_signals() -> None:
    """From here on they are ignored; the parent has blocked them up to here, so that none came too early."""
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)


class Channel:
    """The worker's end of the socket."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._readable = select.poll()  # unlike select, for descriptors of any number
        self._readable.register(self._socket, select.POLLIN)
        self._unpacker: Unpacker[ToWorker] = Unpacker(Decoder(ToWorker))

    def send(self, message: FromWorker) -> None:
        """Waits while the other side is behind by more than the socket holds."""
        self._socket.sendall(pack(message))

    def receive(self, seconds: float | None) -> Iterator[ToWorker]:
        """All that has come; where nothing has, waits `seconds` for it (None: for ever)."""
        while self._readable.poll(None if seconds is None else 1000 * seconds):
            yield from self._unpacker.feed(self._socket.recv(READ_BYTES) or _leave())
            seconds = 0

    def leave_at_its_end(self) -> NoReturn:
        """Ends the process when the other side has closed the socket, or died."""
        poll = select.poll()
        poll.register(self._socket, 0)  # an end is always reported
        poll.poll()
        _leave()


def _leave() -> NoReturn:
    os._exit(0)


def serve(channel: Channel) -> NoReturn:
    """Loads what the first message says and runs the engine; raises what ends it."""
    # Here: this module must be there, deaf to signals, before torch is. And before there are options, for the
    # sake of a worker that stands by.
    from model.worker.build import build_engine  # noqa: PLC0415

    options = next(channel.receive(None))
    assert isinstance(options, WorkerOptions)
    engine = build_engine(options, lambda step: channel.send(Loading(step)))
    # What is there now stays: to look through it all again would hold up every stream, once for 0.2 s.
    gc.collect()
    gc.freeze()
    channel.send(Ready(engine.info, b"" if engine.prices is None else engine.prices.packed))
    next_stats = 0.0
    while True:
        for message in channel.receive(0 if engine.has_work else BEAT_SECONDS):
            if isinstance(message, Submit):
                engine.add(message.request)
            elif isinstance(message, Abort):
                engine.abort(message.request_id)
        new = engine.step()
        # Idle counts must arrive too: the last pass of a burst always sends them.
        due = not engine.has_work or monotonic() >= next_stats
        if due:
            next_stats = monotonic() + STATS_SECONDS
        if new or due:
            channel.send(Events(new, engine.stats if due else None))
