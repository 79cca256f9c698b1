"""HTTP/1.1 on one connection: uvicorn's protocol, with the limits and the manners that it lacks.

Knows nothing about the application. Invariants: the head of a request takes no more memory than
`ConnectionLimits` allow (431); a request that isn't whole in time is answered with 408, so that no
connection is held for nothing; a server that is full closes the connection that has waited longest for its
client before it turns away a new one; an offer to change the protocol, which every Java client makes, is
ignored as HTTP allows, and the request is answered as it stands.
"""

import asyncio
import json
import logging
from typing import Any, Literal, NamedTuple

import httptools
from uvicorn import Config
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from server.errors import error_body

logger = logging.getLogger(__name__)

MAX_PIPELINED = 16  # requests sent ahead on one connection: parsing one takes a hundred times its bytes
RETRY_SECONDS = b"1"
LINGER_SECONDS = 2.0  # in which a refused client may read why

Refusal = Literal[400, 408, 431, 503]
CODES = {400: "bad_request", 408: "request_timeout", 431: "headers_too_large", 503: "too_many_connections"}


class ConnectionLimits(NamedTuple):
    """What clients may take before a request of theirs is whole. `request_timeout` is in seconds."""

    max_connections: int
    max_header_bytes: int  # of one request, its first line included
    max_header_count: int
    request_timeout: float


class Crowd:
    """The connections of one server, and those among them that wait for their client."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._num_open = 0
        self._waiting: dict[BoundedProtocol, None] = {}  # the longest waiting first

    def enter(self) -> bool:
        """Counts a new connection; false if there is no room for it even when another one is closed."""
        self._num_open += 1
        if self._num_open <= self.limits.max_connections:
            return True
        if not self._waiting:
            return False
        next(iter(self._waiting)).give_way()
        return True

    def leave(self, connection: "BoundedProtocol") -> None:
        """A connection has ended."""
        self._num_open -= 1
        self._waiting.pop(connection, None)

    def waits(self, connection: "BoundedProtocol") -> None:
        """It is the client's turn."""
        self._waiting.setdefault(connection)

    def works(self, connection: "BoundedProtocol") -> None:
        """A whole request is being answered."""
        self._waiting.pop(connection, None)

    def is_waiting(self, connection: "BoundedProtocol") -> bool:
        """Whether it is the client's turn."""
        return connection in self._waiting


class RefusalError(Exception):
    """Ends a connection with an answer; raised within the parser's callbacks as well."""

    def __init__(self, status: Refusal, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class BoundedProtocol(HttpToolsProtocol):
    """One connection. uvicorn makes it, with the keywords that it knows, and `crowd` beside them.

    The client's turn is from the beginning, or from the end of an answer, until a request is whole.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        crowd: Crowd,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._crowd = crowd
        self._limits = crowd.limits
        self._deadline: asyncio.TimerHandle | None = None
        self._has_begun = False  # some of a request has come, but not all
        self._is_body = False  # and its head was all there
        self._has_progress = False  # the parser found more than a part of a head or of trailers
        self._num_header_bytes = 0  # of the fields that were read to their end
        self._num_raw_bytes = 0  # that came since without progress
        self._is_replay = False
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request, or turns the client away."""
        super().connection_made(transport)
        has_room = self._crowd.enter()
        self._crowd.waits(self)
        self._start_deadline()
        if not has_room:
            self._refuse(RefusalError(503, f"all {self._limits.max_connections} connections are in use"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Frees what was held."""
        self._crowd.leave(self)
        self._end_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what came; refuses what breaks a limit or is no HTTP."""
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except RefusalError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            raised = error.__context__  # by a callback
            unreadable = RefusalError(400, "this is no HTTP request that can be read")
            self._refuse(raised if isinstance(raised, RefusalError) else unreadable)
        if self._crowd.is_waiting(self):
            self._start_deadline()

    def _feed(self, data: bytes) -> None:
        self._has_progress, num_bytes = False, len(data)
        while True:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                self._refuse_upgrade()
                data = data[upgrade.args[0] :]
        self._num_raw_bytes = 0 if self._has_progress else self._num_raw_bytes + num_bytes
        self._check_head()

    def _refuse_upgrade(self) -> None:
        """Goes on as if the client had offered no other protocol.

        The parser takes what follows the head for bytes of that protocol, so another one gets the same
        head, without the offer, before it gets the body.
        """
        line = f"{self.scope['method']} {self.url.decode()} HTTP/{self.scope['http_version']}\r\n"
        kept = [b"%s: %s\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._is_replay = True
        self.parser.feed_data(line.encode() + b"".join(kept) + b"\r\n")
        self._is_replay = False

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._is_replay:
            return
        self._has_begun = True
        self._num_header_bytes = self._num_raw_bytes = 0
        self._start_deadline()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        if not self._is_replay:
            self._count(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; or a trailer behind a body, which is dropped, but counts as well."""
        if self._is_replay:
            return
        self._count(len(name) + len(value) + len(b": \r\n"))
        if len(self.headers) >= self._limits.max_header_count:
            raise self._head_too_large()
        if not self._is_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head has ended: the application is called."""
        if self._is_replay:
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise RefusalError(400, f"at most {MAX_PIPELINED} requests may be sent ahead")
        if self.parser.get_method() == b"CONNECT":
            raise RefusalError(400, "this server is no proxy")
        self._is_body = self._has_progress = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._has_progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole, unless its body is still to come from the second parser."""
        if self.parser.should_upgrade():
            return
        self._has_begun, self._is_body, self._has_progress = False, False, True
        self._end_deadline()
        if not self.cycle.response_complete:
            self._crowd.works(self)
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        is_old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, Http10(app, cycle) if is_old else app)

    def on_response_complete(self) -> None:
        """The client's turn again, unless it has sent requests ahead."""
        if not self.pipeline:
            self._crowd.waits(self)
        super().on_response_complete()

    def _count(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        self._check_head()

    def _check_head(self) -> None:
        if max(self._num_header_bytes, self._num_raw_bytes) > self._limits.max_header_bytes:
            raise self._head_too_large()

    def _head_too_large(self) -> RefusalError:
        limits = self._limits
        return RefusalError(
            431,
            f"a request may have {limits.max_header_count} headers and {limits.max_header_bytes} bytes "
            "before its body",
        )

    def _start_deadline(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._limits.request_timeout, self._deadline_passed)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _deadline_passed(self) -> None:
        self._deadline = None
        if not self._crowd.is_waiting(self):  # what came is sent ahead: an earlier request is being answered
            self._start_deadline()
        elif self._has_begun:
            seconds = self._limits.request_timeout
            self._refuse(RefusalError(408, f"the request did not arrive whole in {seconds:g} seconds"))
        else:
            self.timeout_keep_alive_handler()

    def give_way(self) -> None:
        """Ends a connection whose client is awaited, to make room."""
        self._crowd.works(self)
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Ends an idle connection, also one whose client has not read its answer."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _refuse(self, error: RefusalError) -> None:
        """Answers, if no answer has begun, and closes."""
        logger.debug("%s was refused: %s", self.client, error.message)
        self._end_deadline()
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        if self._crowd.is_waiting(self) and not begun:
            self.transport.write(self._answer(error))
            self._close_slowly()
        else:
            self.transport.close()

    def _close_slowly(self) -> None:
        """Drops what still comes for a while: a close at once takes the answer from a client that sends."""
        self._is_refused = True
        if self.cycle is not None:  # what waits for the rest of a body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        else:
            self.transport.close()

    def _answer(self, error: RefusalError) -> bytes:
        kind = "server_error" if error.status == 503 else "invalid_request_error"
        body = json.dumps(error_body(error.message, kind, code=CODES[error.status])).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            *([(b"retry-after", RETRY_SECONDS)] if error.status == 503 else []),
        ]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        return STATUS_LINE[error.status] + head + b"\r\n" + body


class Http10:
    """An application whose answers an HTTP/1.0 client can read: never chunked, ended by the connection's end.

    uvicorn sends such clients chunks, which they take for a part of the text.
    """

    def __init__(self, app: ASGI3Application, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle
        self._has_length = False

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Runs the application."""

        async def send_plainly(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.start":
                self._has_length = any(name == b"content-length" for name, _ in message.get("headers", ()))
            if not self._has_length:
                self._cycle.chunked_encoding = False
                self._cycle.expected_content_length = len(message.get("body", b""))  # type: ignore[arg-type]
            await send(message)

        await self._app(scope, receive, send_plainly)
