"""httpx over a parser in C: a client that measures a server must not take the cores that it measures.

httpx's own transport takes about as long for a frame of a stream as the server does. This one has what a
benchmark needs: HTTP/1.1, a connection for each request, bodies that are read as they come.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import httptools
import httpx

READ_BYTES = 2**16


class PlainTransport(httpx.AsyncBaseTransport):
    """`timeout` is in seconds without a byte."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request; the answer's body is still to come."""
        url, is_secure = request.url, request.url.scheme == "https"
        opening = asyncio.open_connection(
            url.host, url.port or (443 if is_secure else 80), ssl=is_secure or None
        )
        try:
            async with asyncio.timeout(self._timeout):
                reader, writer = await opening
        except OSError as error:  # TimeoutError is one
            raise httpx.ConnectError(str(error) or type(error).__name__, request=request) from error
        answer = _Answer(reader, writer, self._timeout)
        try:
            writer.write(_head(request) + await request.aread())
            while not answer.is_begun:
                await answer.read()
        except BaseException:
            await answer.aclose()
            raise
        return httpx.Response(answer.status, headers=answer.headers, stream=answer, request=request)


def _head(request: httpx.Request) -> bytes:
    """The head of a request, as bytes; the server is to close the connection behind its answer."""
    lines = [b"%s: %s\r\n" % field for field in request.headers.raw if field[0].lower() != b"connection"]
    head = b"".join([*lines, b"Connection: close\r\n\r\n"])
    return b"%s %s HTTP/1.1\r\n%s" % (request.method.encode(), request.url.raw_path, head)


class _Answer(httpx.AsyncByteStream):
    """An answer on its way. The parser calls `on_...`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout: float) -> None:
        self._reader, self._writer, self._timeout = reader, writer, timeout
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []  # of the body, not yet taken
        self._is_whole = False
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.is_begun = False  # its head is all there

    async def read(self) -> None:
        """Takes in what has come, at least a byte. Raises httpx's errors."""
        try:
            async with asyncio.timeout(self._timeout):
                data = await self._reader.read(READ_BYTES)
            if not data:
                raise httpx.RemoteProtocolError(
                    "the server closed the connection before its answer was whole"
                )
            self._parser.feed_data(data)
        except TimeoutError:
            raise httpx.ReadTimeout(f"nothing came for {self._timeout:g} s") from None
        except OSError as error:
            raise httpx.ReadError(str(error)) from error
        except httptools.HttpParserError as error:
            raise httpx.RemoteProtocolError(str(error)) from error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            if self._parts:
                parts, self._parts = self._parts, []
                yield b"".join(parts)
            elif self._is_whole:
                return
            else:
                await self.read()

    async def aclose(self) -> None:
        """Closes the connection."""
        self._writer.close()
        with suppress(OSError):  # it may have broken before
            await self._writer.wait_closed()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head."""
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The end of the head."""
        self.status, self.is_begun = self._parser.get_status_code(), True

    def on_body(self, part: bytes) -> None:
        """A part of the body."""
        self._parts.append(part)

    def on_message_complete(self) -> None:
        """The end of the body."""
        self._is_whole = True
