"""What Prometheus may ask: the names of the API's contract, which are vLLM's with our prefix.

Each application has a registry of its own. Requests are measured where their events arrive, so that a
slow client doesn't make the engine look slow. Knows nothing about HTTP but the format of its answer.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from time import perf_counter
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

from model.protocol import EngineClient, FinishReason, SequenceStats
from server.engine_counts import PREFIX, EngineCollector, LifetimeCounts

REFUSAL_REASONS = ("requests", "tokens", "engine_loading", "engine_unavailable", "server_draining")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds.
FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
)
WHOLE_REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
# 1 is one read of the weights per token.
PASSES_PER_TOKEN = (0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 16, 32)


class Metrics:
    """All metrics of one server. `model_name` becomes a label, as vLLM's dashboards expect."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self._registry = CollectorRegistry()
        self._counts = LifetimeCounts(engine)
        self._registry.register(EngineCollector(self._counts, engine, self._labels))
        ProcessCollector(registry=self._registry)
        self._finished = self._counter(
            "request_success", "Sequences that ended", {"finished_reason": get_args(FinishReason)}
        )
        self._rejected = self._counter(
            "admission_rejections", "Requests not taken", {"reason": REFUSAL_REASONS}
        )
        self._answers = self._counter(
            "http_requests", "Requests answered; 499: the client left before", {"handler": (), "status": ()}
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", FIRST_TOKEN
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence", BETWEEN_TOKENS
        )
        self.whole_request = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token", WHOLE_REQUEST
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "From arrival at the engine to the first pass", QUEUE
        )
        self.passes_per_token = self._histogram(
            "passes_per_token", "Decode passes of a sequence / tokens it committed", PASSES_PER_TOKEN
        )

    def engine_spoke(self) -> None:
        """Notes the engine's counts, lest those since the last scrape be lost if it dies."""
        self._counts.update()

    def rejected(self, reason: str) -> None:
        """A request was refused."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def finished(self, reason: FinishReason) -> None:
        """A sequence ended."""
        self._finished.labels(**self._labels, finished_reason=reason).inc()

    def expect_answers(self, answers: Iterable[tuple[str, int]]) -> None:
        """Lets the series of these handlers and statuses begin at 0."""
        for handler, status in answers:
            self._answers.labels(**self._labels, handler=handler, status=status)

    def answered(self, handler: str, status: int) -> None:
        """A request to `handler`, the path of a route, was answered."""
        self._answers.labels(**self._labels, handler=handler, status=status).inc()

    def render(self) -> bytes:
        """The answer to a scrape, of type `CONTENT_TYPE`.

        Never OpenMetrics, even if it is asked for: prometheus-client's turns the colon of a name into _.
        """
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: Mapping[str, Iterable[str]]) -> Counter:
        """`labels`: the values that are known beforehand, each of which is a series from the start."""
        counter = Counter(PREFIX + name, text, [*self._labels, *labels], registry=self._registry)
        for values in product(*labels.values()):
            counter.labels(*self._labels.values(), *values)
        return counter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        names = list(self._labels)
        family = Histogram(PREFIX + name, text, names, buckets=buckets, registry=self._registry)
        return family.labels(**self._labels)


class SequenceMeter:
    """Measures one sequence from its submission on."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = perf_counter()
        self._last_token: float | None = None
        self._num_tokens = 0

    def tokens(self, count: int) -> None:
        """`count` tokens arrived together; the time since the last ones is shared among them."""
        now = perf_counter()
        self._num_tokens += count
        if self._last_token is None:
            self._metrics.first_token.observe(now - self._started)
        else:
            for _ in range(count):
                self._metrics.between_tokens.observe((now - self._last_token) / count)
        self._last_token = now

    def finished(self, reason: FinishReason, stats: SequenceStats | None) -> None:
        """The sequence ended; an aborted one says nothing about how long requests take."""
        self._metrics.finished(reason)
        if reason in ("stop", "length"):
            self._metrics.whole_request.observe(perf_counter() - self._started)
        if stats is not None:
            self._metrics.queue.observe(stats.queue_seconds)
            if self._num_tokens > 1:  # the first one comes out of reading the prompt
                self._metrics.passes_per_token.observe(stats.passes / (self._num_tokens - 1))
