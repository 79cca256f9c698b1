"""The engine's counts as Prometheus sees them: read when they are asked for, never stored twice.

Invariant: a counter never falls. The engine counts from the moment it was loaded; what an engine that
died had counted is added to what the next one counts.
"""

from collections.abc import Iterable, Iterator, Mapping

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from model.protocol import Engine, EngineStats

GAUGES = {
    "num_requests_running": "Sequences that take part in passes",
    "num_requests_waiting": "Sequences that wait for a place",
    "kv_cache_usage": "Share of the KV cache's pages that requests hold, 0 to 1",
    "rows_in_flight": "Rows of tokens that are not committed yet",
    "row_budget": "Rows of a pass beyond which nothing is speculated",
    "speculation_enabled": "1 if a request alone is speculated for, by policy and prices of passes",
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens read, those found in the prefix cache included"),
    "generation_tokens": ("generation_tokens", "Tokens committed"),
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "preemptions": ("num_preemptions", "Sequences that had to give their pages back for a while"),
    "draft_tokens": ("spec_decode_num_draft_tokens", "Tokens predicted by an early depth"),
    "accepted_tokens": (
        "spec_decode_num_accepted_tokens",
        "Predicted tokens that the last depth confirmed",
    ),
    "passes": ("passes", "Passes through the shared block"),
}
RENAMED = {"kv_cache_usage": "kv_cache_usage_perc"}  # vLLM's name, though it isn't per cent there either
ROW_BUCKETS = [2**i for i in range(13)]
PREFIX = "speed:"


class LifetimeCounts:
    """Adds up the counts of one engine after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_restarts = engine.num_restarts
        self._ended = EngineStats()  # counts of all engines before this one
        self._latest = EngineStats()

    def update(self) -> None:
        """Takes the engine's latest counts. To be called whenever it says anything."""
        stats = self._engine.stats()
        if self._engine.num_restarts != self._num_restarts:
            self._num_restarts = self._engine.num_restarts
            self._ended = add_counts(self._ended, self._latest)
        self._latest = stats

    def total(self) -> EngineStats:
        """Gauges of the present engine, counters of all engines."""
        self.update()
        return add_counts(self._ended, self._latest)


def add_counts(ended: EngineStats, present: EngineStats) -> EngineStats:
    """Counters added, gauges of `present`."""
    first, second = msgspec.structs.asdict(ended), msgspec.structs.asdict(present)
    for name, value in second.items():
        if isinstance(value, dict):
            second[name] = {key: first[name].get(key, 0) + value.get(key, 0) for key in first[name] | value}
        elif name not in GAUGES:
            second[name] = first[name] + value
    return EngineStats(**second)


class EngineCollector(Collector):
    """Turns the engine's counts into metrics at every scrape."""

    def __init__(self, counts: LifetimeCounts, engine: Engine, labels: Mapping[str, str]) -> None:
        self._counts = counts
        self._engine = engine
        self._names = list(labels)
        self._values = list(labels.values())

    def collect(self) -> Iterator[Metric]:
        """All metrics of the engine."""
        stats = self._counts.total()
        for field, text in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + RENAMED.get(field, field), text, labels=self._names)
            gauge.add_metric(self._values, getattr(stats, field))
            yield gauge
        for field, (name, text) in COUNTERS.items():
            yield self._counter(name, text, getattr(stats, field))
        yield self._counter("engine_restarts", "Engines started after one died", self._engine.num_restarts)
        yield self._flushes(stats.flushes)
        yield self._pass_rows(stats)

    def _counter(self, name: str, text: str, value: int) -> Metric:
        counter = CounterMetricFamily(PREFIX + name, text, labels=self._names)
        counter.add_metric(self._values, value)
        return counter

    def _flushes(self, flushes: Mapping[int, int]) -> Metric:
        text = "Predictions that a later depth contradicted, by that depth"
        family = CounterMetricFamily(PREFIX + "spec_decode_flushes", text, labels=[*self._names, "depth"])
        for depth, count in sorted(flushes.items()):
            family.add_metric([*self._values, str(depth)], count)
        return family

    def _pass_rows(self, stats: EngineStats) -> Metric:
        family = HistogramMetricFamily(PREFIX + "pass_rows", "Rows of a pass", labels=self._names)
        family.add_metric(self._values, cumulative(stats.pass_rows, ROW_BUCKETS), sum_value=stats.rows)
        return family


def cumulative(counts: Mapping[int, int], bounds: Iterable[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets of counts by value: how many values are at most each bound."""
    buckets = [
        (str(float(bound)), float(sum(count for value, count in counts.items() if value <= bound)))
        for bound in bounds
    ]
    return [*buckets, ("+Inf", float(sum(counts.values())))]
