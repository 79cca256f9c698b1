"""Which replica has read which pages, and which one is to read the next prompt. Pure Python, no Ray.

A page is known by the digest of all that precedes its end, as in the engine's own prefix cache; what is
remembered of a replica is what was sent there last, as much as its cache holds. That is a guess (a replica
may have dropped a page, or have read it for another front), and a wrong one costs time, never text.
"""

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import takewhile

MOST_EARLY = 256  # ends that are known before their beginnings: those of the last milliseconds


class Places:
    """What this process has sent where, and what of it still runs."""

    def __init__(self, slack: int) -> None:
        """`slack`: how many more requests than the least busy replica one with the right pages may have."""
        self._slack = slack
        self._kept: dict[str, OrderedDict[bytes, None]] = {}  # oldest first
        self._running: dict[str, str] = {}  # request -> replica
        self._load: Counter[str] = Counter()
        self._early: deque[str] = deque(maxlen=MOST_EARLY)

    def load(self, replica: str) -> int:
        """Requests that run there or wait there."""
        return self._load[replica]

    def num_held(self, replica: str, pages: Sequence[bytes]) -> int:
        """How many of the first pages the replica has read."""
        kept = self._kept.get(replica, ())
        return sum(1 for _ in takewhile(kept.__contains__, pages))

    def best(self, pages: Sequence[bytes], replicas: Sequence[str]) -> str:
        """The replica that has read most of the beginning, unless it has too much to do; else the least busy.

        Of equals the digests decide, so that two fronts that know nothing send a beginning to one place.
        """
        least = min(map(self.load, replicas))
        held = {replica: self.num_held(replica, pages) for replica in replicas}
        first_unread = max(held.values())
        ahead = b"".join(pages[first_unread : first_unread + 1] or pages[-1:])

        def merit(replica: str) -> tuple[int, int, bytes]:
            return held[replica], -self.load(replica), _lot(ahead, replica)

        return max((each for each in replicas if self.load(each) <= least + self._slack), key=merit)

    def sent(self, request: str, replica: str, pages: Sequence[bytes], pages_kept: int) -> None:
        """A request went there; its pages will be the last to be dropped of at most `pages_kept`."""
        if request in self._early:
            self._early.remove(request)
        else:
            self._running[request] = replica
            self._load[replica] += 1
        kept = self._kept.setdefault(replica, OrderedDict())
        for page in reversed(pages):  # the end of a text is the first to be dropped
            kept[page] = None
            kept.move_to_end(page)
        while len(kept) > pages_kept:
            kept.popitem(last=False)

    def ended(self, request: str) -> None:
        """The request has its answer, or lost its replica. That may be told before `sent` is."""
        replica = self._running.pop(request, None)
        if replica is None:
            self._early.append(request)
        else:
            self._load[replica] -= 1

    def keep(self, replicas: Iterable[str]) -> None:
        """These are there now; what was known of others is forgotten."""
        there = set(replicas)
        self._kept = {name: kept for name, kept in self._kept.items() if name in there}


def _lot(page: bytes, replica: str) -> bytes:
    return hashlib.blake2b(page + replica.encode(), digest_size=8).digest()
