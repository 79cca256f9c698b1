"""What `speed bench serve` reports: percentiles of waiting times, goodput, a table and a plot.

The keys of the summary are those of `vllm bench serve`: times in milliseconds under `mean_ttft_ms`,
`p99_tpot_ms` and so on, rates in requests or tokens a second.
"""

import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from bench.load_client import Answer
from training.pyplot import pyplot

METRICS: dict[str, tuple[str, Callable[[Answer], Sequence[float]]]] = {
    "ttft": ("time to first token", lambda answer: [answer.ttft]),
    "tpot": ("time per token after it", lambda answer: [] if answer.tpot is None else [answer.tpot]),
    "itl": ("time between pieces", lambda answer: answer.itl),
    "e2el": ("end-to-end time", lambda answer: [answer.e2el]),
}


class Limit(NamedTuple):
    """A service level objective: a metric of one request stays at or below so many milliseconds."""

    metric: str
    milliseconds: float

    def is_kept(self, answer: Answer) -> bool:
        """Whether the request kept to it; one without the metric, such as TPOT of one token, does."""
        return all(1e3 * value <= self.milliseconds for value in METRICS[self.metric][1](answer))


def summary(
    answers: list[Answer], duration: float, limits: Sequence[Limit], percentiles: Sequence[float]
) -> dict[str, object]:
    """Counts, rates and times of a run of `duration` seconds; failed requests count in `failed` alone."""
    done = [answer for answer in answers if not answer.error]
    tokens_in, tokens_out = (
        sum(answer.input_tokens for answer in done),
        sum(answer.output_tokens for answer in done),
    )
    good = sum(all(limit.is_kept(answer) for limit in limits) for answer in done)
    figures: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "duration": duration,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if limits else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_concurrent_requests": most_at_once(done),
    }
    for name, (_, values_of) in METRICS.items():
        values = [1e3 * value for answer in done for value in values_of(answer)]
        figures |= _statistics(name, values, percentiles)
    return figures


def _statistics(name: str, values: list[float], percentiles: Sequence[float]) -> dict[str, object]:
    if not values:
        return {}
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
        **{f"p{percent:g}_{name}_ms": percentile(values, percent) for percent in percentiles},
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 lie, between neighbours in a straight line."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def most_at_once(answers: list[Answer]) -> int:
    """The largest number of requests that were in flight at one time."""
    changes = [(answer.started, 1) for answer in answers]
    changes += [(answer.started + answer.e2el, -1) for answer in answers]
    now = most = 0
    for _, change in sorted(changes):  # an end before a start at the same time
        now += change
        most = max(most, now)
    return most


def table(figures: dict[str, object], percentiles: Sequence[float]) -> str:
    """The figures for a reader."""
    completed, failed, duration = figures["completed"], figures["failed"], figures["duration"]
    lines = [
        f"{completed} requests answered and {failed} failed in {duration:.1f} s, "
        f"{figures['max_concurrent_requests']} at once at most",
        f"{figures['request_throughput']:.2f} requests/s, {figures['output_throughput']:.1f} tokens/s out, "
        f"{figures['total_token_throughput']:.1f} in and out",
    ]
    if figures["request_goodput"] is not None:
        lines.append(f"goodput {figures['request_goodput']:.2f} requests/s")
    names = ["mean", *(f"p{percent:g}" for percent in percentiles)]
    lines.append(f"{'milliseconds':24}" + "".join(f"{name:>10}" for name in names))
    for metric, (label, _) in METRICS.items():
        cells = [figures.get(f"{name}_{metric}_ms") for name in names]
        shown = "".join(f"{'-' if cell is None else format(cell, '.1f'):>10}" for cell in cells)
        lines.append(f"{label:24}{shown}")
    return "\n".join(lines)


def details(answers: list[Answer]) -> dict[str, object]:
    """Lists with one entry a request, in seconds, under the names of `vllm bench serve`."""
    return {
        "input_lens": [answer.input_tokens for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "start_times": [answer.started for answer in answers],
        "ttfts": [answer.ttft for answer in answers],
        "itls": [answer.itl for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def plot(answers: list[Answer], file: Path) -> None:
    """For each metric the share of requests, or of pieces, that waited at most so long."""
    plt = pyplot()

    done = [answer for answer in answers if not answer.error]
    figure, axes = plt.subplots(1, len(METRICS), figsize=(3.2 * len(METRICS), 3.2), sharey=True)
    for axis, (label, values_of) in zip(axes, METRICS.values(), strict=True):
        values = sorted(1e3 * value for answer in done for value in values_of(answer))
        shares = [100 * (index + 1) / len(values) for index in range(len(values))]
        axis.step(values, shares, where="post")
        axis.set_xlabel(f"{label}, ms")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% at most as long")
    axes[0].set_ylim(0, 100)
    figure.tight_layout()
    figure.savefig(file)
