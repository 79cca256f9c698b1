"""A worker process and the socket to it, as the API process holds them.

A pair of connected sockets has no name and no place in the file system: whatever TMPDIR may be, a worker
can be reached, nobody else can speak to it, and nothing is left behind whoever is killed.
"""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

from msgspec.msgpack import Decoder

from model.machine import child_environment
from model.worker.main import PARENTS_SIGNALS, REPORT_SIGNAL
from model.worker.messages import FromWorker, ToWorker, Unpacker, pack

# -P: a model.py or model/ in the folder where the user stands must not be taken for this package
COMMAND = (sys.executable, "-P", "-m", "model.worker")
READ_BYTES = 2**18
LEAVE_SECONDS = 5.0  # a worker that takes longer to end by itself is killed
KILL_SECONDS = 5.0  # one that even then is there hangs in the kernel, and is left to it
POLL_SECONDS = 0.01  # between two looks whether a worker that was told to end has ended


class LinkClosedError(ConnectionError):
    """The worker can't be reached any more."""


class WorkerLink:
    """One running worker. Made by `open`; `end` must be called."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self.num_messages = 0  # that the worker has sent
        self._reader = reader
        self._writer = writer
        self._unpacker: Unpacker[FromWorker] = Unpacker(Decoder(FromWorker))

    @classmethod
    async def open(cls, command: Sequence[str] = COMMAND) -> "WorkerLink":
        """Starts a worker, which waits for its options; raises OSError if it can't be."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = _spawn([*command, str(theirs.fileno())], theirs.fileno())
            try:
                reader, writer = await asyncio.open_unix_connection(sock=ours, limit=READ_BYTES)
            except BaseException:
                process.kill()
                process.wait()
                raise
        except BaseException:
            ours.close()
            raise
        return cls(process, reader, writer)

    def send(self, message: ToWorker) -> None:
        """Never waits: what the socket doesn't take is kept here. Raises LinkClosedError."""
        content = pack(message)
        if self._writer.is_closing():
            raise LinkClosedError("the engine process ended")
        self._writer.write(content)

    async def messages(self) -> AsyncIterator[FromWorker]:
        """What the worker says until it closes the socket or ends; raises MessageError at nonsense."""
        while data := await self._read():
            for message in self._unpacker.feed(data):
                self.num_messages += 1
                yield message

    async def _read(self) -> bytes:
        """What has come; nothing at the end."""
        try:
            return await self._reader.read(READ_BYTES)
        except OSError:  # it ended before it had read all that was sent to it
            return b""

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
        """Ends `messages`, whatever the worker does."""
        self._writer.transport.abort()

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
