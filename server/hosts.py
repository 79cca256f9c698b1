"""The names under which a server may be addressed.

A page of any site can make a browser send requests to 127.0.0.1 under a name of that site (DNS rebinding),
and then read the answers, because for the browser both are one origin. Such requests say whose name was
used. Invariant: a server that asks for no key and listens on a loopback address answers none of them.
"""

import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.error_answers import error_response
from server.errors import ForbiddenHostError
from server.settings import Settings


def is_local(host: str) -> bool:
    """Whether a name or an address, without a port, means this machine and reaches nothing else."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def allowed_hosts(settings: Settings) -> list[str] | None:
    """Names besides the local ones; None: any."""
    if settings.allowed_hosts is not None:
        return None if "*" in settings.allowed_hosts else [*settings.allowed_hosts, settings.host]
    return [] if is_local(settings.host) and not settings.asks_for_key else None


def _without_port(host: str) -> str:
    """The name in a Host header; IPv6 addresses are in brackets there."""
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    return name.rstrip(".").lower()


class HostMiddleware:
    """Answers 403 where the Host header holds none of `names`, which may begin with `*.`, and no local one.

    A request without that header passes: browsers always send it.
    """

    def __init__(self, app: ASGIApp, names: list[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names if not name.startswith("*."))
        self._suffixes = tuple(name[1:].lower() for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on everything that isn't HTTP."""
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if not host or self._is_allowed(_without_port(host)):
            await self._app(scope, receive, send)
        else:
            await error_response(ForbiddenHostError(host), scope)(scope, receive, send)

    def _is_allowed(self, name: str) -> bool:
        return is_local(name) or name in self._names or name.endswith(self._suffixes)
