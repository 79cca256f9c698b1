"""The order in which waiting sequences are admitted. Pure Python.

The best priority goes first. Within a priority the tenants take turns, one admission a round, so that one
of them cannot fill the queue of all; what a tenant sends is admitted in the order of its arrival. A
sequence gets its rank when it is first admitted and keeps it: the smallest rank returns first after a
pre-emption and is pre-empted last. Invariant: rounds never go back while anybody of a priority waits, so
every sequence has its turn.
"""

import heapq
from collections.abc import Iterator

from model.schedule.sequence import Sequence

Heap = list[tuple[tuple[int, ...], Sequence]]  # the smallest key first


class _Tenant:
    """The sequences of one tenant and one priority that were never admitted; `due` is their next round."""

    def __init__(self, due: int) -> None:
        self.due = due
        self.waiting: Heap = []  # by arrival


class _Level:
    """All tenants of one priority; `round` is that of the latest admission."""

    def __init__(self) -> None:
        self.round = 0
        self.tenants: dict[str, _Tenant] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits here."""
        return not any(tenant.waiting for tenant in self.tenants.values())


class WaitingQueue:
    """Sequences without pages: not admitted yet, or pre-empted."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._returned: Heap = []  # by rank

    def __len__(self) -> int:
        return sum(map(len, self._heaps()))

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, in no particular order."""
        for heap in self._heaps():
            yield from (sequence for _, sequence in heap)

    def push(self, sequence: Sequence) -> None:
        """Queues a sequence at the place that its rank, or else its arrival, gives it."""
        if sequence.rank is not None:
            heapq.heappush(self._returned, (sequence.rank, sequence))
            return
        level = self._levels.setdefault(sequence.request.priority, _Level())
        tenant = level.tenants.setdefault(sequence.request.tenant, _Tenant(level.round))
        heapq.heappush(tenant.waiting, ((sequence.arrival,), sequence))

    def first(self) -> Sequence | None:
        """Who is to be admitted next."""
        if not (self._levels or self._returned):
            return None  # as in nearly every pass
        heap = self._first_heap()
        return heap[0][1] if heap else None

    def pop(self) -> None:
        """Takes out the one that `first` names."""
        heapq.heappop(self._first_heap())

    def admitted(self, sequence: Sequence) -> None:
        """Gives a popped sequence its rank, and its tenant's turn to the others."""
        if sequence.rank is not None:
            return
        request = sequence.request
        level = self._levels.setdefault(request.priority, _Level())
        tenant = level.tenants.setdefault(request.tenant, _Tenant(level.round))
        level.round = max(level.round, tenant.due)
        sequence.rank = (request.priority, level.round, sequence.arrival)
        tenant.due = level.round + 1
        # Turns are remembered while anybody waits for one, which bounds what is kept.
        self._levels = {priority: level for priority, level in self._levels.items() if not level.is_empty}

    def remove(self, request_id: str) -> Sequence | None:
        """Takes a sequence out; None if it is not here."""
        for heap in self._heaps():
            for index, (_, sequence) in enumerate(heap):
                if sequence.request.request_id == request_id:
                    del heap[index]
                    heapq.heapify(heap)
                    return sequence
        return None

    def _heaps(self) -> Iterator[Heap]:
        yield self._returned
        for level in self._levels.values():
            yield from (tenant.waiting for tenant in level.tenants.values())

    def _first_heap(self) -> Heap:
        """The heap whose first entry is next; an empty one if nobody waits."""
        heaps = [(rank, self._returned) for rank, _ in self._returned[:1]]
        for priority, level in self._levels.items():
            for tenant in level.tenants.values():
                heaps += [((priority, tenant.due, *key), tenant.waiting) for key, _ in tenant.waiting[:1]]
        return min(heaps, key=lambda pair: pair[0], default=((), self._returned))[1]
