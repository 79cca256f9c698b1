"""What Prometheus may ask: the names of the API's contract, which are vLLM's with our prefix.

Each application has a registry of its own. Requests are measured where their events arrive, so that a
slow client doesn't make the engine look slow. Knows nothing about HTTP but the format of its answer.
"""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

from model.protocol import EngineClient, FinishReason, SequenceStats
from server.engine_counts import LABEL, PREFIX, EngineCollector, LifetimeCounts

REFUSAL_REASONS = ("requests", "tokens", "engine_loading", "engine_unavailable", "server_draining")
MODELS_BUSY = "models_busy"  # where models share a server: none could be unloaded to make room
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


class MetricFamilies:
    """The metrics of one server. Each has a series for each model, whose name is a label."""

    def __init__(self, reasons: Sequence[str] = REFUSAL_REASONS) -> None:
        """`reasons`: why requests may be refused."""
        self.registry = CollectorRegistry()
        self.engines = EngineCollector()
        self.registry.register(self.engines)
        ProcessCollector(registry=self.registry)
        self.reasons = reasons
        self.finished = self._counter("request_success", "Sequences that ended", "finished_reason")
        self.rejected = self._counter("admission_rejections", "Requests not taken", "reason")
        self.answers = self._counter(
            "http_requests", "Requests answered; 499: the client left before", "handler", "status"
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

    def render(self) -> bytes:
        """The answer to a scrape, of type `CONTENT_TYPE`.

        Never OpenMetrics, even if it is asked for: prometheus-client's turns the colon of a name into _.
        """
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, [LABEL, *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, [LABEL], buckets=buckets, registry=self.registry)


class Metrics:
    """The metrics of one model. Every series is there from the start, whether or not it is loaded."""

    def __init__(
        self, engine: EngineClient | None, model_name: str, families: MetricFamilies | None = None
    ) -> None:
        """`families` are those of the server; None: the model has some of its own."""
        families = families or MetricFamilies()
        self._name = model_name
        self._counts = LifetimeCounts(engine)
        families.engines.add(model_name, self._counts)
        self._finished = families.finished
        self._rejected = families.rejected
        for reason in get_args(FinishReason):
            self._finished.labels(model_name, reason)
        for reason in families.reasons:
            self._rejected.labels(model_name, reason)
        self.first_token = families.first_token.labels(model_name)
        self.between_tokens = families.between_tokens.labels(model_name)
        self.whole_request = families.whole_request.labels(model_name)
        self.queue = families.queue.labels(model_name)
        self.passes_per_token = families.passes_per_token.labels(model_name)

    def follow(self, engine: EngineClient | None) -> None:
        """Counts another engine of the model from now on, or none while it is unloaded."""
        self._counts.follow(engine)

    def engine_spoke(self) -> None:
        """Notes the engine's counts, lest those since the last scrape be lost if it dies."""
        self._counts.update()

    def rejected(self, reason: str) -> None:
        """A request was refused."""
        self._rejected.labels(self._name, reason).inc()

    def finished(self, reason: FinishReason) -> None:
        """A sequence ended."""
        self._finished.labels(self._name, reason).inc()


class AnswerCounts:
    """Counts answers by route, status and the model that was named.

    A request that names no model counts as one of the model that is alone, else as one of "".
    """

    def __init__(self, families: MetricFamilies, model_names: Sequence[str]) -> None:
        self._answers = families.answers
        self._names = [*model_names, ""] if len(model_names) > 1 else model_names

    def expect(self, answers: Iterable[tuple[str, int]]) -> None:
        """Lets the series of these handlers and statuses begin at 0."""
        for handler, status in answers:
            for name in self._names:
                self._answers.labels(name, handler, status)

    def answered(self, handler: str, status: int, model_name: str | None) -> None:
        """A request to `handler`, the path of a route, was answered."""
        name = self._names[-1] if model_name is None else model_name
        self._answers.labels(name, handler, status).inc()


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
