"""The engine's counts as Prometheus sees them: read when they are asked for, never stored twice.

Invariant: a counter never falls. The engine counts from the moment it was loaded; what an engine that
died or was unloaded had counted is added to what the next one counts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from model.protocol import EngineClient, EngineInfo, EngineStats, EngineUnavailableError, RestartReason

GAUGES = {
    "num_requests_running": "Sequences that take part in passes",
    "num_requests_waiting": "Sequences that wait for a place",
    "kv_cache_usage": "Share of the KV cache's pages that requests hold, 0 to 1",
    "rows_in_flight": "Rows of tokens that are not committed yet",
    "row_budget": "Rows of a pass beyond which nothing is speculated",
    "speculation_enabled": "1 if a request alone is speculated for, by policy and prices of passes",
    "resident_memory": "Bytes of main memory that the engine's process holds",
    "device_memory": "Bytes of a GPU's memory that the engine holds; 0 on a CPU",
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
COUNTERS_BY_DEPTH = {
    "flushes": ("spec_decode_flushes", "Predictions that a later depth contradicted, by that depth"),
    "compared_readouts": (
        "spec_decode_compared_readouts",
        "Predictions of each depth that the last depth has judged, taken or not",
    ),
    "agreeing_readouts": (
        "spec_decode_agreeing_readouts",
        "Predictions of each depth that were what the last depth said",
    ),
}
RENAMED = {
    "kv_cache_usage": "kv_cache_usage_perc",  # vLLM's name, though it isn't per cent there either
    "resident_memory": "engine_resident_memory_bytes",
    "device_memory": "engine_device_memory_bytes",
}
ROW_BUCKETS = [2**i for i in range(13)]
PREFIX = "speed:"
LABEL = "model_name"  # as vLLM's dashboards expect


class LifetimeCounts:
    """Adds up the counts of one engine after the other."""

    def __init__(self, engine: EngineClient | None = None) -> None:
        self._engine: EngineClient | None = None
        self._num_restarts = 0
        self._ended = EngineStats()  # counts of all engines before this one
        self._ended_restarts: Counter[RestartReason] = Counter()  # of those that were unloaded
        self._latest = EngineStats()
        self.follow(engine)

    def follow(self, engine: EngineClient | None) -> None:
        """Counts another engine from now on, or none: the model was unloaded, and no gauge is above 0."""
        if self._engine is not None:
            self.update()
            self._ended = add_counts(self._ended, self._latest)
            self._ended_restarts.update(self._engine.restarts)
        self._engine = engine
        self._num_restarts = 0 if engine is None else _num_restarts(engine)
        self._latest = EngineStats()

    @property
    def info(self) -> EngineInfo | None:
        """Facts of the model, if it is loaded."""
        try:
            return None if self._engine is None else self._engine.info
        except EngineUnavailableError:
            return None

    def restarts(self, reason: RestartReason) -> int:
        """How often an engine was started again for `reason`."""
        present = 0 if self._engine is None else self._engine.restarts.get(reason, 0)
        return self._ended_restarts[reason] + present

    def update(self) -> None:
        """Takes the engine's latest counts. To be called whenever it says anything."""
        if self._engine is None:
            return
        stats = self._engine.stats()
        if stats is self._latest:
            return  # the engine has said nothing of its counts
        if (num_restarts := _num_restarts(self._engine)) != self._num_restarts:
            self._num_restarts = num_restarts
            self._ended = add_counts(self._ended, self._latest)
        self._latest = stats

    def total(self) -> EngineStats:
        """Gauges of the present engine, counters of all engines."""
        self.update()
        return add_counts(self._ended, self._latest)


def _num_restarts(engine: EngineClient) -> int:
    return sum(engine.restarts.values())


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
    """Turns the counts of all engines into metrics at every scrape: one family, a series for each model."""

    def __init__(self) -> None:
        self._counts: dict[str, LifetimeCounts] = {}  # by the name of the model

    def add(self, model_name: str, counts: LifetimeCounts) -> None:
        """Shows the counts of one more model."""
        self._counts[model_name] = counts

    def collect(self) -> Iterator[Metric]:
        """All metrics of the engines."""
        stats = {name: counts.total() for name, counts in self._counts.items()}
        for field, text in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + RENAMED.get(field, field), text, labels=[LABEL])
            for name, counts in stats.items():
                gauge.add_metric([name], getattr(counts, field))
            yield gauge
        for field, (metric, text) in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + metric, text, labels=[LABEL])
            for name, counts in stats.items():
                counter.add_metric([name], getattr(counts, field))
            yield counter
        yield self._restarts()
        for field, (metric, text) in COUNTERS_BY_DEPTH.items():
            by_model = {name: getattr(counts, field) for name, counts in stats.items()}
            yield self._by_depth(metric, text, by_model)
        yield self._pass_rows(stats)
        yield self._cache_config()

    def _restarts(self) -> Metric:
        text = "Engines started after one failed, by what became of that one"
        family = CounterMetricFamily(PREFIX + "engine_restarts", text, labels=[LABEL, "reason"])
        for name, counts in self._counts.items():
            for reason in get_args(
                RestartReason
            ):  # from the start: rates need a value before the first fault
                family.add_metric([name, reason], counts.restarts(reason))
        return family

    def _by_depth(self, metric: str, text: str, by_model: Mapping[str, Mapping[int, int]]) -> Metric:
        """A series for each depth, before anything was counted for it: drafts come before the last one."""
        family = CounterMetricFamily(PREFIX + metric, text, labels=[LABEL, "depth"])
        first = 2 if metric == "spec_decode_flushes" else 1  # the first draft has nothing to contradict
        for name, counts in by_model.items():
            info = self._counts[name].info
            depths = range(first, info.num_loops + first - 1) if info else ()
            for depth in sorted({*depths, *counts}):
                family.add_metric([name, str(depth)], counts.get(depth, 0))
        return family

    def _cache_config(self) -> Metric:
        """vLLM's names of these labels, by which routers learn how large the cache is; none while loading."""
        text = "1, with the size of the KV cache as labels: tokens of a page, and pages"
        family = GaugeMetricFamily(
            PREFIX + "cache_config_info", text, labels=[LABEL, "block_size", "num_gpu_blocks"]
        )
        for name, counts in self._counts.items():
            if info := counts.info:
                size = info.kv_page_size
                family.add_metric([name, str(size), str(info.kv_cache_tokens // size)], 1)
        return family

    def _pass_rows(self, by_model: Mapping[str, EngineStats]) -> Metric:
        family = HistogramMetricFamily(PREFIX + "pass_rows", "Rows of a pass", labels=[LABEL])
        for name, stats in by_model.items():
            family.add_metric([name], cumulative(stats.pass_rows, ROW_BUCKETS), sum_value=stats.rows)
        return family


def cumulative(counts: Mapping[int, int], bounds: Iterable[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets of counts by value: how many values are at most each bound."""
    buckets = [
        (str(float(bound)), float(sum(count for value, count in counts.items() if value <= bound)))
        for bound in bounds
    ]
    return [*buckets, ("+Inf", float(sum(counts.values())))]
