"""Prompts beside sequences that decode: the time a pass keeps, whose turn it is, nobody waits for ever."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.options import SchedulerLimits
from model.schedule.batch import ScheduledRun
from model.schedule.cost import FixedBudget, MeasuredCost, PassPrice, PromptPrice
from model.schedule.drafts import make_policy
from model.schedule.wave import Wave
from tests.fake_model import Harness

LOOPS = 4


def cost(prompt: PromptPrice, base: float = 10.0, row: float = 1.0) -> MeasuredCost:
    return MeasuredCost([1], [64], [[PassPrice(base, row)]], most_rows=256, prompt=prompt)


def rows_of(batch: list[ScheduledRun], name: str) -> int:
    return sum(run.num_rows for run in batch if run.sequence.request.request_id == name)


def beside_a_stream(
    prompt: PromptPrice, policy: str = "none", error_rate: float = 1.0, **limits: float
) -> Harness:
    """A harness in which "stream" has decoded a few tokens."""
    options = {"prefill_chunk_size": 64, "prefill_rows": 256, **limits}
    harness = Harness(SchedulerLimits(**options), 3000, error_rate, cost=cost(prompt))  # type: ignore[arg-type]
    harness.add("stream", [1], 3000, policy=policy)
    while len(harness.text("stream")) < 5:
        harness.step()
    return harness


@pytest.mark.parametrize(("factor", "rows"), [(2.0, 20), (3.0, 40), (1.0, 1), (100.0, 256)])
def test_a_pass_with_a_stream_keeps_its_time(factor: float, rows: int) -> None:
    """Ten milliseconds of decoding leave as much for prompt rows of half a millisecond each."""
    harness = beside_a_stream(PromptPrice(0.5), pass_time_factor=factor)
    harness.add("long", [2] * 700, 1)
    batches = [harness.step() for _ in range(40)]
    assert all(rows_of(batch, "stream") == 1 for batch in batches)
    assert all(0 < rows_of(batch, "long") <= rows for batch in batches if harness.text("long") == [])
    assert max(rows_of(batch, "long") for batch in batches) == rows


def test_rows_cost_more_behind_a_long_text() -> None:
    harness = beside_a_stream(PromptPrice(0.1, token=0.001))
    harness.add("long", [2] * 900, 1)
    rows: list[int] = []
    while not harness.text("long"):
        rows.append(rows_of(harness.step(), "long"))
    assert (rows[0], rows[-LOOPS] <= 10 / (0.1 + 0.8) + 1) == (64, True)


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_a_pass_keeps_its_time_where_rows_score_their_prompt(prompt_logprobs: int | None) -> None:
    """Only rows that score cost the head, four times a row here, and only in their last loop.

    They used to be priced like any other row: twenty in their last loop took 50 ms where 10 were left.
    """
    price = PromptPrice(0.5, score=2.0)
    harness = beside_a_stream(price)
    harness.add("long", [2] * 100, 1, prompt_logprobs=prompt_logprobs)
    most, num_scored = 0.0, 0
    for _ in range(200):
        runs = [run for run in harness.step() if run.sequence.request.request_id == "long"]
        scored = sum(run.num_prompt_rows for run in runs)
        num_scored += scored
        most = max(most, sum(run.num_rows for run in runs) * price.row + scored * price.score)
    assert harness.text("long")
    assert num_scored == (0 if prompt_logprobs is None else 99)
    # What is left of a pass, and a quarter more where a run isn't cut for so little.
    assert 9 <= most <= 12.5


def test_a_stream_gets_a_token_a_pass_beside_a_prompt_as_it_does_alone() -> None:
    """Prompts don't narrow waves: its drafts are worth as much to the one who waits for the next token."""
    harness = beside_a_stream(PromptPrice(0.5), policy="adaptive", error_rate=0.0)
    while len(harness.text("stream")) < 40:
        harness.step()
    harness.add("long", [2] * 400, 1)
    before, passes = len(harness.text("stream")), 0
    while not harness.text("long"):
        harness.step()
        passes += 1
    assert len(harness.text("stream")) - before >= 0.95 * passes


@pytest.mark.parametrize("streams", [0, 1])
def test_a_short_prompt_does_not_wait_for_a_long_one(streams: int) -> None:
    """Its first token comes after a pass a loop."""
    harness = beside_a_stream(PromptPrice(0.5))
    if not streams:
        harness.abort("stream")
    harness.add("long", [2] * 600, 1)
    for _ in range(7):
        harness.step()
    harness.add("short", [3, 4], 2)
    for _ in range(LOOPS):
        harness.step()
    assert len(harness.text("short")) == 1
    assert not harness.text("long")


def test_prompts_are_read_in_full_chunks_while_nobody_decodes() -> None:
    """640 positions in chunks of 64: ten passes, and three to let the last chunk through."""
    harness = Harness(SchedulerLimits(), 3000, cost=cost(PromptPrice(0.5)))
    harness.add("long", [2] * 640, 1)
    rows = []
    while not harness.text("long"):
        rows.append(rows_of(harness.step(), "long"))
    assert len(rows) == 13
    assert rows[3:-3] == [256] * 7


def test_the_rows_of_a_budget_are_what_a_pass_has_room_for() -> None:
    """`--row-budget 32` says that 32 rows take as long as one."""
    harness = Harness(SchedulerLimits(), 3000, cost=FixedBudget(32))
    harness.add("stream", [1], 300, policy="none")
    while not harness.text("stream"):
        harness.step()
    harness.add("long", [2] * 500, 1)
    assert {rows_of(harness.step(), "long") for _ in range(30)} == {32}


def test_chunks_in_flight_are_cut_when_a_stream_begins() -> None:
    """Four chunks of 64 rows are under way: the first pass of the stream already has its time."""
    harness = Harness(SchedulerLimits(), 3000, cost=cost(PromptPrice(0.5)))
    harness.add("long", [2] * 900, 1)
    for _ in range(6):
        harness.step()
    harness.add("stream", [1], 40, policy="none")
    while not harness.text("stream"):
        assert rows_of(harness.step(), "long") > 100
    for _ in range(20):
        assert 0 < rows_of(harness.step(), "long") <= 25
    harness.finish()
    assert harness.text("long") == harness.backend.continue_plainly([2] * 900, 1, frozenset())


@given(
    long=st.integers(20, 60),
    shorts=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 6)), min_size=1, max_size=40),
    price=st.sampled_from([0.2, 1.0, 4.0, 30.0]),
    max_num_seqs=st.integers(2, 8),
)
@settings(max_examples=40, deadline=None)
def test_no_prompt_is_overtaken_for_ever(
    long: int, shorts: list[tuple[int, int]], price: float, max_num_seqs: int
) -> None:
    """Who comes after as many rows as a prompt has never gets any before it; so all are read."""
    limits = SchedulerLimits(max_num_seqs, prefill_chunk_size=8, prefill_rows=32)
    harness = Harness(limits, 3000, cost=cost(PromptPrice(price)))
    harness.add("stream", [1], 2000, policy="none")
    while not harness.text("stream"):
        harness.step()
    harness.add("long", [2] * long, 1)
    late = set[str]()
    reading = harness.scheduler._prompts  # the last position of a prompt, alone, counts as decoding
    begun = reading.rows_run
    pending = list(enumerate(shorts))
    pause = 0
    while not harness.text("long"):
        while pending and pause == 0:
            index, (length, pause) = pending.pop(0)
            if reading.rows_run - begun >= long * LOOPS:
                late.add(str(index))
            harness.add(str(index), [3 + index] * length, 1)
        pause = max(0, pause - 1)
        batch = harness.step()
        if any(rows_of(batch, name) for name in late):
            assert rows_of(batch, "long")
        assert sum(run.num_rows for run in batch) > rows_of(batch, "stream")
        if not pending:
            pending = list(enumerate(shorts, start=len(harness.answers)))  # they never stop coming
    harness.abort("stream")


def test_the_rest_of_a_prompt_counts_not_its_length() -> None:
    """With 150 of its 300 positions left, a prompt lets one of 100 pass and none of 200."""
    harness = beside_a_stream(PromptPrice(0.5))
    harness.add("long", [2] * 300, 1)
    while harness.scheduler.running[-1].wave.num_complete < 150:
        harness.step()
    harness.add("between", [3] * 100, 1)
    harness.add("rest", [4] * 200, 1)
    for index, name in enumerate(("between", "long", "rest")):
        while not harness.text(name):
            harness.step()
        assert len([n for n in ("between", "long", "rest") if harness.text(n)]) == index + 1


def test_a_better_priority_is_read_first() -> None:
    harness = beside_a_stream(PromptPrice(0.5), prefix_caching=False)
    harness.add("short", [2] * 30, 1)
    harness.add("urgent", [3] * 300, 1, priority=-1)
    while not harness.text("urgent"):
        harness.step()
        assert not harness.text("short")


@pytest.mark.parametrize("factor", [0.99, math.nan, -1.0])
def test_a_pass_time_factor_below_one_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="pass_time_factor"):
        SchedulerLimits(pass_time_factor=factor)


def test_a_run_that_is_cut_is_the_same_positions_at_the_same_depth() -> None:
    wave = Wave(list(range(30)), 3, make_policy("none", frozenset()), length_limit=40)
    wave.enter_prompt(20)
    wave.update(wave.runs[:], {})
    wave.split(0, 7)
    assert [(run.start, run.num_rows, run.depth) for run in wave.runs] == [(0, 7, 1), (7, 13, 1)]
    assert wave.num_rows_to_read == 20 * 2 + 10 * 3
