"""API keys: which requests may pass.

Knows nothing about users or rights: a key opens everything. Invariants: without a valid key nothing
behind this middleware runs, the reading of the body included; how long a comparison takes says nothing
about the keys; keys are held as digests only, and appear in no message. What runs finds in the scope a
name for the key's holder (`TENANT`), by which clients are kept apart in the queue and the prefix cache.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.error_answers import error_response
from server.errors import AuthenticationError
from server.paths import route_path
from server.settings import ApiKey, Settings, SettingsError

ALWAYS_OPEN = ("/health", "/ready")  # for those who watch the process: they hold no key

TENANT = "speed.tenant"  # in the scope of a request: whose key it brings
TENANT_DIGITS = 32


def load_api_keys(settings: Settings) -> list[str]:
    """All keys, of the flags or the environment and of the file; raises SettingsError."""
    keys = list(settings.api_keys or [])
    if settings.api_key_file is not None:
        keys += _keys_of_file(settings.api_key_file)
    return keys


def _keys_of_file(path: Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        TypeAdapter(list[ApiKey]).validate_python(keys)
    except OSError as error:
        raise SettingsError(f"--api-key-file {path}: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError):
        raise SettingsError(
            f"--api-key-file {path}: a key has 1 to 512 printable ASCII characters and no spaces"
        ) from None
    if not keys:  # a server that was meant to be guarded must not start open
        raise SettingsError(f"--api-key-file {path}: there is no key in it")
    return keys


def open_paths(settings: Settings) -> list[str]:
    """Paths that need no key."""
    return [*ALWAYS_OPEN] if settings.protect_metrics else [*ALWAYS_OPEN, "/metrics"]


class ApiKeyMiddleware:
    """Answers 401 unless a request brings one of `keys` or asks for one of `open_paths`.

    A key is sent as `Authorization: Bearer KEY`, as `x-api-key: KEY`, which is Anthropic's way, or as the
    password of basic authentication, which is how a browser that opens the playground or the documentation
    asks for it. Of two that are sent one must be valid.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: Sequence[str]) -> None:
        self._app = app
        self._tenants = {_digest(key.encode()): _tenant(key) for key in keys}
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on everything that isn't HTTP."""
        tenant = self._tenant_of(scope) if scope["type"] == "http" else ""
        if tenant is not None:
            scope[TENANT] = tenant
        if scope["type"] != "http" or route_path(scope) in self._open_paths or tenant is not None:
            await self._app(scope, receive, send)
            return
        is_page = "text/html" in Headers(scope=scope).get("accept", "")
        await error_response(AuthenticationError(ask_browser=is_page), scope)(scope, receive, send)

    def _tenant_of(self, scope: Scope) -> str | None:
        """Whose key the request brings; None without a valid one."""
        headers = Headers(scope=scope)
        presented = (_presented_key(headers.get("authorization", "")), headers.get("x-api-key", "").encode())
        # Both are compared with all keys, whichever matches.
        found = [
            tenant
            for given in map(_digest, presented)
            for digest, tenant in self._tenants.items()
            if hmac.compare_digest(given, digest)
        ]
        return found[0] if found else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _tenant(key: str) -> str:
    """A name for the holder of a key, from which nobody learns the key or the digest it is checked by."""
    return hashlib.sha256(b"tenant\n" + key.encode()).hexdigest()[:TENANT_DIGITS]


def _presented_key(authorization: str) -> bytes:
    """The key in an Authorization header; empty, which is no key, if there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
