"""What is logged: a line for each request, and what the libraries may say.

Invariant: no line holds text of a prompt or a completion, a header's value or a query string, and no
client can make a line of its own (what it sent is escaped).
"""

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.options import LOG_FORMAT
from server.errors import quote
from server.paths import route_path
from server.settings import Settings

access_logger = logging.getLogger("server.access")
PROBES = ("/health", "/ready", "/metrics")  # asked all day: their lines come at level debug only
NO_ANSWER = 499  # nginx's status for a client that went away before it got one


def configure_logging(settings: Settings) -> None:
    """Sets up the loggers of this process; call once."""
    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
    logging.getLogger("sse_starlette").setLevel(logging.INFO)  # at debug level it logs what it sends
    if not access_logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        access_logger.addHandler(handler)
    access_logger.propagate = False
    access_logger.setLevel(settings.log_level.upper())


class AccessRecord(NamedTuple):
    """One request, seen from outside. `completed`: the whole answer was handed over."""

    time: str
    request_id: str
    client: str
    method: str
    path: str
    status: int
    seconds: float
    first_byte_seconds: float | None
    response_bytes: int
    completed: bool

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self._asdict())

    def as_text(self) -> str:
        """One line to read."""
        cut = "" if self.completed else " (cut off)"
        return (
            f"{self.time} {self.client} {self.method} {self.path} {self.status} "
            f"{self.response_bytes} B {self.seconds:.3f} s {self.request_id}{cut}"
        )


class AccessLogMiddleware:
    """Writes the line of each request when its answer has ended, however it ended."""

    def __init__(self, app: ASGIApp, *, as_json: bool) -> None:
        self._app = app
        self._as_json = as_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on everything that isn't HTTP."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        level = logging.DEBUG if route_path(scope) in PROBES else logging.INFO
        if not access_logger.isEnabledFor(level):
            await self._app(scope, receive, send)
            return
        watch = _Watch(send)
        status = NO_ANSWER
        try:
            await self._app(scope, receive, watch.send)
        except Exception:
            status = 500  # answered outside of this middleware
            raise
        finally:
            record = watch.record(scope, status)
            access_logger.log(level, record.as_json() if self._as_json else record.as_text())


class _Watch:
    """Notes what is sent of one answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = time.perf_counter()
        self._first_byte: float | None = None
        self._status: int | None = None
        self._num_bytes = 0
        self._completed = False

    async def send(self, message: Message) -> None:
        await self._send(message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            self._num_bytes += len(message.get("body", b""))
            self._completed = not message.get("more_body", False)
            if self._first_byte is None:
                self._first_byte = time.perf_counter()

    def record(self, scope: Scope, status_without_answer: int) -> AccessRecord:
        first = self._first_byte
        return AccessRecord(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            request_id=scope.get("request_id", ""),
            client=scope["client"][0] if scope.get("client") else "-",
            method=scope["method"],
            path=quote(scope["path"])[1:-1],
            status=status_without_answer if self._status is None else self._status,
            seconds=round(time.perf_counter() - self._started, 6),
            first_byte_seconds=None if first is None else round(first - self._started, 6),
            response_bytes=self._num_bytes,
            completed=self._completed,
        )
