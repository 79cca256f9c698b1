"""What the API process and the engine's process say to each other, and how it looks as bytes.

A message is MessagePack behind four bytes that hold its length. Imports neither torch nor asyncio.
"""

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from model.options import WorkerOptions
from model.protocol import EngineInfo, EngineStats, GenerationRequest, TokenEvent

LENGTH = struct.Struct("<I")
LONGEST = 2**30  # bytes of a message; a length beyond it means that the bytes are no messages

Message = TypeVar("Message")


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Server -> worker: continue this."""

    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Server -> worker: end this early."""

    request_id: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker -> server: the model is loaded. `prices` of passes are for the worker after this one."""

    info: EngineInfo
    prices: bytes = b""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Worker -> server: what it does until it is ready, in words that follow "loading"."""

    step: str


class Events(msgspec.Struct, frozen=True, tag=True):
    """Worker -> server: what a pass brought, and now and then what has been done in all.

    One without events comes at least every second from an engine that has nothing to do: it is alive.
    """

    events: list[TokenEvent]
    stats: EngineStats | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker -> server: the last words of a worker."""

    reason: str


ToWorker = WorkerOptions | Submit | Abort
FromWorker = Loading | Ready | Events | Failed


class MessageError(ValueError):
    """The bytes from the other side are not its messages."""


def pack(message: ToWorker | FromWorker) -> bytes:
    """A message as it travels. Raises what msgspec raises for values that MessagePack can't hold."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


class Unpacker(Generic[Message]):
    """Turns bytes, however they were cut on their way, into messages."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[Message]") -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes, in order; raises MessageError at what is no message."""
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > LONGEST:
                raise MessageError(f"a message of {length} bytes is announced, {LONGEST} is the limit")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = self._decoder.decode(body)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise MessageError(f"a message can't be read: {error}") from None
            yield message
