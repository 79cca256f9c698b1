"""What the reports of all replicas say together. Invariant: no counter falls when a replica goes."""

from collections.abc import Callable, Mapping
from functools import reduce
from time import monotonic

import msgspec

from model.protocol import EngineInfo, EngineStats
from server.engine_counts import GAUGES, add_counts
from server.replicas.messages import Report

STALE_SECONDS = 60.0  # after which a replica that is not heard of counts as gone


class Census:
    """The latest report of each replica. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._present: dict[str, Report] = {}
        self._heard: dict[str, float] = {}  # when each of them was heard of last
        self._gone: dict[str, EngineStats] = {}
        self.info: EngineInfo | None = (
            None  # of the model, with the places of all that are ready; None: none is
        )
        self.stats = EngineStats()

    @property
    def not_ready(self) -> list[str]:
        """Replicas that would refuse a request."""
        return [name for name, report in self._present.items() if report.info is None]

    def take(self, reports: Mapping[str, Report], *, is_complete: bool) -> None:
        """Reports by replica; `is_complete`: there is no other replica."""
        now = self._clock()
        self._present |= reports
        self._heard |= dict.fromkeys(reports, now)
        for name in self._present.keys() - reports.keys():
            if is_complete or now - self._heard[name] > STALE_SECONDS:
                del self._heard[name]
                self._gone[name] = self._present.pop(name).stats
        for name in self._present:
            self._gone.pop(name, None)  # one that was not heard of for long
        self.info = _together([report.info for report in self._present.values() if report.info])
        self.stats = reduce(add_counts, self._gone.values(), EngineStats())
        self.stats = add_counts(self.stats, _sum([report.stats for report in self._present.values()]))


def _together(infos: list[EngineInfo]) -> EngineInfo | None:
    """One model, wherever it runs: replicas differ in nothing but where they are."""
    if not infos:
        return None
    return msgspec.structs.replace(infos[0], max_num_seqs=sum(info.max_num_seqs for info in infos))


def _sum(stats: list[EngineStats]) -> EngineStats:
    """Counts and gauges of replicas side by side; of shares and limits the average."""
    total = reduce(add_counts, stats, EngineStats())
    gauges = {name: sum(getattr(each, name) for each in stats) for name in GAUGES}
    gauges["kv_cache_usage"] /= max(1, len(stats))
    gauges["row_budget"] //= max(1, len(stats))
    gauges["speculation_enabled"] = min((each.speculation_enabled for each in stats), default=0)
    return msgspec.structs.replace(total, **gauges)
