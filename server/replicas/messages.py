"""What the front of a cluster and its replicas say to each other. No Ray here."""

import msgspec

from model.protocol import EngineHealth, EngineInfo, EngineStats, RestartReason, TokenEvent


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """To which replica a call may go. Every call brings one as its keyword `routing`.

    `pages` are the digests of the prompt's full pages, in order; `pages_kept` is how many a replica's cache
    holds. Replicas in `avoid` come last. `only` names the one replica that the call is for.
    """

    pages: list[bytes] = []
    pages_kept: int = 0
    avoid: list[str] = []
    only: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of what a replica answers to a request: an event, or why it took no request."""

    replica: str
    event: TokenEvent | None = None
    refusal: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one replica. Its counters never fall, whatever becomes of its worker."""

    replica: str
    health: EngineHealth
    info: EngineInfo | None  # None unless it is ready
    stats: EngineStats
    restarts: dict[RestartReason, int]


class ReplicaLostError(ConnectionError):
    """A replica ended while it answered."""
