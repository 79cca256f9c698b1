"""Which replica has read which pages, and which one is to read the next prompt. Pure Python, no Ray.

A page is known by the digest of all that precedes its end, as in the engine's own prefix cache; what is
remembered of a replica is what was sent there last, as much as its cache holds. That is a guess (a replica
may have dropped a page, or have read it for another front), and a wrong one costs time, never text.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile


class Places:
    """What this process has sent where, or is about to send, and what of it still runs."""

    def __init__(self, slack: int) -> None:
        """`slack`: how many more requests than the least busy replica one with the right pages may have."""
        self._slack = slack
        self._kept: dict[str, OrderedDict[bytes, None]] = {}  # oldest first
        self._running: dict[str, str] = {}  # request -> replica
        self._load: Counter[str] = Counter()

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

    def chosen(self, request: str, replica: str, pages: Sequence[bytes], pages_kept: int) -> None:
        """A request is to go there: at once it counts as running there, and its pages as read there.

        Not only when the replica has it: what comes meanwhile would go elsewhere, and be read twice.
        """
        self._count_at(request, replica)
        self._remember(replica, pages, pages_kept)

    def sent(self, request: str, replica: str, pages: Sequence[bytes], pages_kept: int) -> None:
        """A request went there, which may be another replica than was chosen, and may have ended already."""
        if request in self._running:
            self._count_at(request, replica)
        self._remember(replica, pages, pages_kept)

    def ended(self, request: str) -> None:
        """The request has its answer, lost its replica or was left before it had one."""
        replica = self._running.pop(request, None)
        if replica is not None:
            self._load[replica] -= 1

    def _count_at(self, request: str, replica: str) -> None:
        self.ended(request)
        self._running[request] = replica
        self._load[replica] += 1

    def _remember(self, replica: str, pages: Sequence[bytes], pages_kept: int) -> None:
        """These pages will be the last to be dropped of at most `pages_kept`."""
        if not pages:  # also of calls that bring no prompt, and know nothing of `pages_kept`
            return
        kept = self._kept.setdefault(replica, OrderedDict())
        for page in reversed(pages):  # the end of a text is the first to be dropped
            kept[page] = None
            kept.move_to_end(page)
        while len(kept) > pages_kept:
            kept.popitem(last=False)

    def keep(self, replicas: Iterable[str]) -> None:
        """These are there now; what was known of others is forgotten."""
        there = set(replicas)
        self._kept = {name: kept for name, kept in self._kept.items() if name in there}


def _lot(page: bytes, replica: str) -> bytes:
    return hashlib.blake2b(page + replica.encode(), digest_size=8).digest()
