"""A worker process and the socket to it, as the API process holds them.

A pair of connected sockets has no name and no place in the file system: whatever TMPDIR may be, a worker
can be reached, nobody else can speak to it, and nothing is left behind whoever is killed.
"""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from msgspec.msgpack import Decoder

from model.machine import child_environment
from model.worker.main import PARENTS_SIGNALS, REPORT_SIGNAL
from model.worker.messages import FromWorker, ToWorker, Unpacker, pack

# -P: a model.py or model/ in the folder where the user stands must not be taken for this package
COMMAND = (sys.executable, "-P", "-m", "model.worker")
LEAVE_SECONDS = 5.0  # a worker that takes longer to end by itself is killed
KILL_SECONDS = 5.0  # one that even then is there hangs in the kernel, and is left to it
POLL_SECONDS = 0.01  # between two looks whether a worker that was told to end has ended


class LinkClosedError(ConnectionError):
    """The worker can't be reached any more."""


class _Receiver(asyncio.Protocol):
    """Hands on what comes where the event loop finds it: a task to read it would have to be woken first."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.early: list[FromWorker] = []  # what came before anybody listened
        self.take: Callable[[FromWorker], None] = self.early.append
        self.num_messages = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unpacker: Unpacker[FromWorker] = Unpacker(Decoder(FromWorker))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport, which may be used from here on."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        """Whole messages go to `take`; what it raises ends the link, as nonsense does."""
        try:
            for message in self._unpacker.feed(data):
                self.num_messages += 1
                self.take(message)
        except Exception as error:
            self.ended.set_exception(error)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """However it ended: it may have ended before it had read all that was sent to it."""
        del exc
        if not self.ended.done():
            self.ended.set_result(None)


class WorkerLink:
    """One running worker. Made by `open`; `end` must be called."""

    def __init__(self, process: subprocess.Popen[bytes], receiver: _Receiver) -> None:
        self.process = process
        self._receiver = receiver
        self._transport = receiver.transport

    @classmethod
    async def open(cls, command: Sequence[str] = COMMAND) -> "WorkerLink":
        """Starts a worker, which waits for its options; raises OSError if it can't be."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = _spawn([*command, str(theirs.fileno())], theirs.fileno())
            try:
                loop = asyncio.get_running_loop()
                _, receiver = await loop.create_unix_connection(_Receiver, sock=ours)
            except BaseException:
                process.kill()
                process.wait()
                raise
        except BaseException:
            ours.close()
            raise
        return cls(process, receiver)

    def send(self, message: ToWorker) -> None:
        """Never waits: what the socket doesn't take is kept here. Raises LinkClosedError."""
        content = pack(message)
        if self._transport.is_closing():
            raise LinkClosedError("the engine process ended")
        self._transport.write(content)

    async def listen(self, take: Callable[[FromWorker], None]) -> None:
        """Calls `take` with all that the worker says until it closes the socket or ends.

        Raises MessageError at nonsense, and what `take` raises.
        """
        for message in self._receiver.early:
            take(message)
        self._receiver.take = take
        await self._receiver.ended

    @property
    def num_messages(self) -> int:
        """How many the worker has sent."""
        return self._receiver.num_messages

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.process.poll() is not None

    @property
    def is_stopped(self) -> bool:
        """Whether the process stands still because of a signal; false where the system doesn't say."""
        try:
            status = Path(f"/proc/{self.process.pid}/stat").read_bytes()
        except OSError:
            return False
        return status.rpartition(b")")[2].split()[:1] == [b"T"]

    def report(self) -> None:
        """Makes the worker write to stderr where its threads stand, if it still can."""
        self._signal(REPORT_SIGNAL)

    def kill(self) -> None:
        """Ends the process; what it had sent can still be read."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends `listen`, whatever the worker does."""
        self._transport.abort()

    async def end(self) -> int | None:
        """Ends the worker if it still runs; its exit code, None if not even SIGKILL ended it."""
        self.close()  # which tells the worker to leave
        try:
            if not await self._ended_within(LEAVE_SECONDS):
                self.kill()
                await self._ended_within(KILL_SECONDS)
        except asyncio.CancelledError:  # no time for manners
            self.kill()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            raise
        return self.process.returncode

    async def _ended_within(self, seconds: float) -> bool:
        # Looked at again and again: it takes neither a thread nor a descriptor, which may be used up.
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.has_ended and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        return self.has_ended

    def _signal(self, number: int) -> None:
        if not self.has_ended:
            self.process.send_signal(number)


def _spawn(command: Sequence[str], descriptor: int) -> subprocess.Popen[bytes]:
    """Starts a process that inherits `descriptor` and hears none of its parent's signals from the start.

    A handler of ours would be reset in the child; a blocked signal stays blocked until the child ignores it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[descriptor], env=child_environment()
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
