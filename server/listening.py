"""Where the server listens, and how many connections it can hold: what the system has to give.

Knows nothing about HTTP. Raises SettingsError for what a user can mend.
"""

import errno
import ipaddress
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from server.settings import Settings, SettingsError

BACKLOG = 2048
OWN_FILES = 64  # descriptors for everything that is no connection: libraries, logs, the engine's process
MOST_CONNECTIONS = 4096  # by default


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listening sockets, one for each address of `host`; port 0 is any free one. Closed at the end."""
    sockets = _bind(host, port)
    try:
        yield sockets
    finally:
        for listening in sockets:
            listening.close()


def _bind(host: str, port: int) -> list[socket.socket]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--host {host}: {_reason(error)}") from None
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            sockets.append(_listen(socket.socket(family, kind, protocol), (address[0], port, *address[2:])))
        except OSError as error:
            if error.errno in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL} and len(found) > 1:
                continue  # "localhost" means ::1 as well, where there is no IPv6
            for other in sockets:
                other.close()
            raise SettingsError(_message(host, port, error)) from None
        port = port or sockets[0].getsockname()[1]
    if not sockets:
        raise SettingsError(f"--host {host}: no address of this machine")
    return sockets


def _listen(unbound: socket.socket, address: tuple[str | int, ...]) -> socket.socket:
    try:
        unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if unbound.family == socket.AF_INET6:
            unbound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        unbound.bind(address)
        # At once: until then another program could take the same address.
        unbound.listen(BACKLOG)
        unbound.setblocking(False)
    except OSError:
        unbound.close()
        raise
    return unbound


def _message(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: another program listens on {host} port {port}"
    option = f"--port {port}" if error.errno == errno.EACCES else f"--host {host}"
    return f"{option}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def url_of(settings: Settings, listening: socket.socket) -> str:
    """How a browser on this machine reaches the server."""
    scheme = "http" if settings.ssl_certfile is None else "https"
    host = settings.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        host = "localhost" if address.is_unspecified else f"[{host}]" if address.version == 6 else host
    return f"{scheme}://{host}:{listening.getsockname()[1]}{settings.root_path}"


def open_connections(wanted: int | None) -> int:
    """How many connections to hold: `wanted`, or what the limit of open files leaves.

    Raises the process's own limit where `wanted` needs it, as far as the system lets it.
    """
    soft, hard = (_number(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    used = OWN_FILES + _num_open_files()
    if wanted is None:
        return max(1, min(soft - used, MOST_CONNECTIONS))
    if wanted + used > hard:
        raise SettingsError(
            f"--max-connections {wanted}: the system lets this process open {hard} files (ulimit -n), "
            f"{used} of which it needs itself"
        )
    if wanted + used > soft:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted + used, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
    return wanted


def _number(limit: int) -> int:
    return 2**31 if limit == resource.RLIM_INFINITY else limit


def _num_open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
