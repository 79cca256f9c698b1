"""Request bodies that come compressed.

Invariants: what is unpacked at a time is at most `PIECE` bytes, so that those who count the body's bytes see
a bomb before it has gone off; between two pieces other requests have their turn.
"""

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.error_answers import error_response
from server.errors import InvalidRequestError, UnsupportedMediaTypeError, quote

PIECE = 2**16  # bytes
GZIP_FORMAT = 16 + zlib.MAX_WBITS  # zlib's way to say: with gzip's header and checksum


class GzipBodyMiddleware:
    """Unpacks bodies in gzip; answers 415 to those in another encoding."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on everything that isn't a POST."""
        has_body = scope["type"] == "http" and scope["method"] == "POST"  # that a route may read
        encoding = Headers(scope=scope).get("content-encoding", "") if has_body else ""
        encoding = encoding.strip().lower()
        if encoding in ("", "identity"):
            await self._app(scope, receive, send)
        elif encoding in ("gzip", "x-gzip"):
            # The length that was announced is that of the packed body.
            packed = (b"content-encoding", b"content-length")
            headers = [(name, value) for name, value in scope["headers"] if name not in packed]
            await self._app({**scope, "headers": headers}, _Unpacked(receive).receive, send)
        else:
            error = UnsupportedMediaTypeError(
                f"the content encoding must be gzip, or none at all, not {quote(encoding)}"
            )
            response = error_response(error, scope)
            response.headers["Accept-Encoding"] = "gzip"
            await response(scope, receive, send)


class _Unpacked:
    """A body in gzip, as the messages of the same body without it."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._decoder = zlib.decompressobj(wbits=GZIP_FORMAT)
        self._packed = b""  # that has come and was not unpacked yet
        self._is_due = False  # whether there may be more to unpack before more must come
        self._more_body = True
        self._has_ended = False

    async def receive(self) -> Message:
        """The next message. Raises InvalidRequestError where the body is no gzip."""
        while not self._has_ended:
            if not self._is_due and self._more_body:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._packed = message.get("body", b"")
                self._more_body = message.get("more_body", False)
            piece = self._unpack()
            if piece:
                await asyncio.sleep(0)
                return {"type": "http.request", "body": piece, "more_body": True}
            if not self._more_body:
                self._check_end()
                return {"type": "http.request", "body": b"", "more_body": False}
        return await self._receive()

    def _unpack(self) -> bytes:
        try:
            piece = self._decoder.decompress(self._packed, PIECE)
        except zlib.error as error:
            raise InvalidRequestError(f"the body is not valid gzip: {error}") from None
        if self._decoder.unused_data:
            raise InvalidRequestError("the body is not valid gzip: something comes after its end")
        self._packed = self._decoder.unconsumed_tail
        self._is_due = bool(piece)
        return piece

    def _check_end(self) -> None:
        self._has_ended = True
        if not self._decoder.eof:
            raise InvalidRequestError("the body is not valid gzip: it ends too early")
