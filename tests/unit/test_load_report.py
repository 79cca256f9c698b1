"""The arithmetic of `speed bench serve`: arrivals, percentiles, goodput, requests at once, prompt files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load_client import Answer
from bench.load_report import Limit, details, most_at_once, percentile, summary, table
from bench.serve import arrivals, limit, percentiles, rate, read_prompts

NUMBERS = st.lists(st.floats(0, 1e6), min_size=1, max_size=30)


def answer(started: float, ttft: float, e2el: float, tokens: int, error: str = "") -> Answer:
    return Answer(
        error=error, text="a", input_tokens=3, output_tokens=tokens, started=started, ttft=ttft, e2el=e2el
    )


@given(NUMBERS, st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    times = arrivals(4000, 5.0, seed=1)
    gaps = np.diff(times)
    assert times == arrivals(4000, 5.0, seed=1) != arrivals(4000, 5.0, seed=2)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(0.2, rel=0.08)  # as wide as its mean: exponential
    assert arrivals(3, math.inf, seed=0) == [0, 0, 0]


def test_a_summary_counts_answers_and_leaves_failures_out_of_every_time() -> None:
    answers = [
        answer(0.0, 0.1, 1.1, 11),
        answer(0.5, 0.3, 0.8, 6),
        answer(0.6, 0.2, 0.2, 1),  # one token: it has no time per token
        answer(0.7, 99.0, 99.0, 99, error="503: busy"),
    ]
    figures = summary(answers, 2.0, [Limit("ttft", 250.0), Limit("tpot", 100.0)], [50, 99])
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (9, 18)
    assert figures["output_throughput"] == 9.0
    assert figures["request_goodput"] == 1.0  # the first and the third keep to both
    assert figures["max_concurrent_requests"] == 3
    assert figures["mean_ttft_ms"] == pytest.approx(200)
    assert figures["p50_tpot_ms"] == pytest.approx(100)
    assert figures["p99_e2el_ms"] == pytest.approx(1094)
    assert "median_itl_ms" not in figures  # nobody had two pieces
    assert "goodput 1.00 requests/s" in table(figures, [50, 99])
    assert details(answers)["errors"] == ["", "", "", "503: busy"]


def test_requests_one_after_the_other_are_never_two_at_once() -> None:
    assert most_at_once([answer(0.0, 0.1, 1.0, 2), answer(1.0, 0.1, 1.0, 2)]) == 1
    assert most_at_once([answer(0.0, 0.1, 1.5, 2), answer(1.0, 0.1, 1.0, 2)]) == 2
    assert most_at_once([]) == 0


def test_prompt_files_hold_texts_and_objects(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('Hello\n\n{"prompt": "Hi", "max_tokens": 3}\n')
    assert read_prompts(file) == [{"prompt": "Hello"}, {"prompt": "Hi", "max_tokens": 3}]
    for text, told in (("\n", "no prompt"), ('a\n{"text": 1}', "line 2"), ("{", "line 1")):
        file.write_text(text)
        with pytest.raises(ValueError, match=told):
            read_prompts(file)


def test_options_are_read_as_written() -> None:
    assert limit("ttft:250") == Limit("ttft", 250.0)
    assert rate("inf") == math.inf
    assert percentiles("50,99.9") == [50, 99.9]
    assert json.dumps(percentiles("0,100")) == "[0.0, 100.0]"
