"""What those who start a server are told: that it loads, how far it is, where it serves, what is unsafe.

Invariant: nobody is told of an address before a request to it would be served.
"""

import logging
import time
from collections.abc import Callable

from model.protocol import EngineHealth
from server.hosts import is_local
from server.settings import Settings, unknown_variables

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # while a model loads


class Announcer:
    """Follows the state of the engine and writes a line of the log when there is something to say."""

    def __init__(
        self, name: str, url: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`url`: where the model is served, if those who are told don't know that yet."""
        self._name = name
        self._url = url
        self._clock = clock
        self._began: float | None = None  # when it was last seen to begin loading
        self._next_line = 0.0
        self._has_begun = False  # whether an address was told
        self._last = ""

    def warn(self, settings: Settings) -> None:
        """What a user may not have meant."""
        if not settings.asks_for_key and not is_local(settings.host):
            logger.warning(
                "no API key is set (--api-key-file), and --host %s can be reached from other machines: "
                "whoever reaches it can use it",
                settings.host,
            )
        if unknown := unknown_variables():
            logger.warning("the environment has %s, which no option is read from", ", ".join(unknown))

    def tick(self, health: EngineHealth) -> None:
        """Call often, with the engine's present state."""
        if health.state == "loading":
            self._loading(health.reason)
        elif health.state == "ready" and self._began is not None:
            place = f"served at {self._url}" if self._url else "loaded"
            logger.info("%s is %s (after %.1f s)", self._name, place, self._clock() - self._began)
            self._began = None
            self._has_begun = True
        elif health.state == "unloaded" and not self._has_begun:
            logger.info("served at %s, each loaded by the first request for it: %s", self._url, self._name)
            self._has_begun = True

    def _loading(self, reason: str) -> None:
        now = self._clock()
        if self._began is None:
            self._began = now
            self._say(now, f"loading {self._name}")
        elif now >= self._next_line or reason != self._last:
            self._say(now, f"loading {self._name}: {reason}, {now - self._began:.0f} s so far")
        self._last = reason

    def _say(self, now: float, text: str) -> None:
        logger.info("%s", text)
        self._next_line = now + SECONDS_BETWEEN_LINES
