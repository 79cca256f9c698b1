"""How many requests were answered with which status: pure ASGI middleware around nearly all others.

Invariant: what a client sends makes no series. A path counts as that of its route, with the names of
parameters in the place of their values, and as "other" if no route has it.
"""

from collections.abc import Iterator, Sequence

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.logs import NO_ANSWER
from server.metrics import AnswerCounts
from server.paths import route_path
from server.state import MODEL

OTHER = "other"
# What a route that generates or counts tokens answers sooner or later.
EXPECTED_STATUSES = (200, 400, 401, 404, 413, 429, NO_ANSWER, 500, 503)


class StatusCountMiddleware:
    """Tells `counts` of each request when its answer has ended. `routes` are those of the application."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], counts: AnswerCounts) -> None:
        self._app = app
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._counts = counts
        counts.expect(_expected(self._routes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on everything that isn't HTTP."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = NO_ANSWER

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception:
            status = 500  # answered outside of all middleware
            raise
        finally:
            self._counts.answered(self._handler(route_path(scope)), status, scope.get(MODEL))

    def _handler(self, path: str) -> str:
        fitting = (route.path for route in self._routes if route.path_regex.match(path))
        return next(fitting, OTHER)


def _expected(routes: Sequence[Route]) -> Iterator[tuple[str, int]]:
    """Handlers and statuses whose series begin at 0: rate() would miss the first error else."""
    yield OTHER, 404
    for route in routes:
        statuses = EXPECTED_STATUSES if "POST" in (route.methods or ()) else (200,)
        yield from ((route.path, status) for status in statuses)
