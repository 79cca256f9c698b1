"""Many sequences at once on the fake model: order, budgets, aborts, memory."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.options import POLICIES, SchedulerLimits
from model.schedule.batch import ScheduledRun
from model.schedule.cost import FixedBudget, MeasuredCost, PassPrice, ReadoutPrice
from model.schedule.drafts import make_policy
from model.schedule.wave import Wave
from tests.fake_model import Harness

Arrival = tuple[int, int, int]  # prompt length, max_tokens, pass at which it arrives


@given(
    arrivals=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 15), st.integers(0, 30)), min_size=1, max_size=8
    ),
    aborts=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 40)), max_size=3),
    row_budget=st.integers(1, 20),
    chunk=st.integers(1, 20),
    max_num_seqs=st.integers(1, 5),
    num_pages=st.integers(14, 60),
    policy=st.sampled_from(POLICIES),
    memory=st.sampled_from([None, 2]),
)
@settings(max_examples=400, deadline=None)
def test_any_schedule_gives_every_request_its_own_text_and_one_end(
    arrivals: list[Arrival],
    aborts: list[tuple[int, int]],
    row_budget: int,
    chunk: int,
    max_num_seqs: int,
    num_pages: int,
    policy: str,
    memory: int | None,
) -> None:
    """Invariants 1, 3, 4, 5 and 6 of the design: random arrivals, aborts, budgets, policies, memory.

    The fake runner checks every cache entry that is read, shared and recomputed ones included.
    """
    limits = SchedulerLimits(max_num_seqs, prefill_chunk_size=chunk, prefill_rows=2 * chunk)
    harness = Harness(limits, num_pages, cost=FixedBudget(row_budget), memory=memory)
    prompts = [[index // 2] * length for index, (length, _, _) in enumerate(arrivals)]  # prefixes are shared
    aborted = {index for index, _ in aborts if index < len(arrivals)}
    for now in range(71):
        for index, (_, max_tokens, due) in enumerate(arrivals):
            if due == now:
                harness.add(str(index), prompts[index], max_tokens, policy=policy, draft_depths=(1, 2))
        for index, due in aborts:
            if due == now and str(index) in harness.answers:
                harness.abort(str(index))
        harness.step()
    harness.finish()
    assert harness.pool.num_free_pages == num_pages
    for index, (_, max_tokens, _) in enumerate(arrivals):
        expected = harness.backend.continue_plainly(prompts[index], max_tokens, frozenset())
        ends = [event.finish_reason for event in harness.answers[str(index)] if event.finish_reason]
        got = harness.text(str(index))
        assert len(ends) == 1
        assert got == expected[: len(got)]
        assert got == expected or (ends == ["abort"] and index in aborted)


def test_a_new_request_joins_at_the_next_pass() -> None:
    harness = Harness()
    harness.add("a", [1], 30)
    for _ in range(6):
        harness.step()
    harness.add("b", [2], 30)
    assert {run.sequence.request.request_id for run in harness.step()} == {"a", "b"}


def test_a_long_prompt_is_read_beside_decoding_rows() -> None:
    """Every pass while the long prompt is read also advances the sequence that decodes."""
    harness = Harness(SchedulerLimits(prefill_chunk_size=8, prefill_rows=8))
    harness.add("a", [1], 60, policy="none")
    for _ in range(4):
        harness.step()
    harness.add("long", [2] * 100, 1)

    def watch(batch: list[ScheduledRun]) -> None:
        ids = [run.sequence.request.request_id for run in batch]
        assert sum(run.num_rows for run in batch if run.sequence.request.request_id == "long") <= 8
        if harness.answers["a"][-1].finish_reason is None:
            assert "a" in ids

    harness.finish(watch)


def test_speculative_rows_stay_below_the_row_budget_and_certain_rows_always_run() -> None:
    harness = Harness(cost=FixedBudget(5), error_rate=0.0)
    for name in "abc":
        harness.add(name, [ord(name)], 40)
    for _ in range(5):
        harness.step()
    sizes = {sum(run.num_rows for run in harness.step()) for _ in range(20)}
    assert sizes == {5}


def test_under_saturation_waves_narrow_to_one_row() -> None:
    harness = Harness(cost=FixedBudget(1), error_rate=0.0)
    for name in "abc":
        harness.add(name, [ord(name)], 40)
    for _ in range(5):
        harness.step()
    assert {sum(run.num_rows for run in harness.step()) for _ in range(10)} == {3}


def test_smaller_priority_goes_first_then_first_come_first_served() -> None:
    harness = Harness(SchedulerLimits(max_num_seqs=1))
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        harness.add(name, [1], 2, priority=priority)
    order: list[str] = []

    def watch(batch: list[ScheduledRun]) -> None:
        order.extend(run.sequence.request.request_id for run in batch)

    harness.finish(watch)
    assert list(dict.fromkeys(order)) == ["b", "c", "a"]


def test_aborting_an_unknown_or_finished_request_does_nothing() -> None:
    harness = Harness()
    harness.add("a", [1], 2)
    harness.finish()
    before = list(harness.answers["a"])
    assert harness.scheduler.abort("a") is None
    assert harness.scheduler.abort("never") is None
    assert harness.answers["a"] == before


def test_the_newest_makes_way_when_pages_run_out_and_says_the_same_later() -> None:
    """Twelve pages of four: two texts of 28 tokens don't fit; the second is read again."""
    harness = Harness(num_pages=12)
    for name in "ab":
        harness.add(name, [ord(name)] * 8, 20)
    harness.finish()
    for name in "ab":
        assert harness.text(name) == harness.backend.continue_plainly([ord(name)] * 8, 20, frozenset())
    assert (harness.stats("a").preemptions, harness.scheduler.counts.preemptions > 0) == (0, True)
    assert harness.stats("b").preemptions == harness.scheduler.counts.preemptions


def test_a_later_arrival_of_a_better_priority_is_not_the_one_that_makes_way() -> None:
    harness = Harness(num_pages=12)
    harness.add("old", [1] * 8, 20, priority=5)
    for _ in range(8):
        harness.step()
    harness.add("urgent", [2] * 8, 20, priority=0)
    harness.finish()
    assert harness.stats("urgent").preemptions == 0
    assert harness.stats("old").preemptions > 0


def test_a_known_beginning_is_not_read_again() -> None:
    """Full pages of prompt and output alike; the last prompt token always runs."""
    harness = Harness(error_rate=0.0)
    harness.add("a", [7] * 17, 10)
    harness.finish()
    again = [7] * 17 + harness.text("a")[:7]
    harness.add("b", again, 5)
    rows = {(run.start + i) for run in harness.step() for i in range(run.num_rows)}
    harness.finish()
    assert rows == set(range(20, 24))
    assert harness.stats("a").cached_prompt_tokens == 0
    assert harness.stats("b").cached_prompt_tokens == 20
    assert harness.text("b") == harness.backend.continue_plainly(again, 5, frozenset())
    assert (harness.scheduler.counts.prefix_hits, harness.scheduler.counts.prefix_queries) == (20, 17 + 24)


def test_who_begins_alike_waits_for_the_one_that_reads_it() -> None:
    """Eight choices of one prompt read it once."""
    harness = Harness(SchedulerLimits(prefill_chunk_size=8, prefill_rows=32))
    for index in range(8):
        harness.add(str(index), [7] * 65, 6)
    prompt_rows = 0

    def watch(batch: list[ScheduledRun]) -> None:
        nonlocal prompt_rows
        prompt_rows += sum(run.num_rows for run in batch if run.start < 64)

    harness.finish(watch)
    assert prompt_rows == 64 * 4
    assert sorted(harness.stats(str(index)).cached_prompt_tokens for index in range(8)) == [0] + [64] * 7


def test_other_loops_or_salts_share_nothing() -> None:
    harness = Harness()
    harness.add("a", [7] * 17, 4, num_loops=4)
    harness.finish()
    harness.add("b", [7] * 17, 4, num_loops=2)
    harness.finish()
    assert harness.stats("b").cached_prompt_tokens == 0


def prices(base: float, row: float, head: float = 0.0) -> MeasuredCost:
    return MeasuredCost([1], [64], [[PassPrice(base, row)]], most_rows=100, readout=ReadoutPrice(head))


def test_waves_are_full_while_rows_are_free_and_narrow_when_they_are_not() -> None:
    """Drafts that hold in two of three cases: worth a row at a tenth of a pass, not at nine."""

    def rows_per_token(cost: MeasuredCost) -> float:
        harness = Harness(error_rate=0.33, error_depths=range(1, 2), cost=cost)
        harness.add("a", [1, 2, 3], 200, policy="single")
        harness.finish()
        return harness.stats("a").rows / 199

    assert rows_per_token(prices(1.0, 0.9)) == 4.0
    assert rows_per_token(prices(1.0, 0.1)) > 4.5


def test_useless_drafts_cost_next_to_nothing() -> None:
    """Invariant 7 in rows: what a model that is always wrong wastes on drafts, where a row costs a tenth."""
    harness = Harness(error_rate=1.0, cost=prices(1.0, 0.1))
    for index in range(3):
        harness.add(str(index), [index], 300, policy="adaptive")
    harness.finish()
    rows = sum(harness.stats(str(index)).rows for index in range(3))
    assert rows < 1.03 * 3 * 299 * 4


def passes_that_read_out(num_sequences: int, policy: str, error_rate: float) -> tuple[int, int]:
    """Of that many texts of 150 tokens that start together on an engine that knows its drafts: how many
    passes those were, and of how many.
    """
    harness = Harness(error_rate=error_rate, cost=prices(1.0, 0.05, head=0.15), num_pages=1000)
    harness.add("first", [99], 100, policy="adaptive")
    harness.finish()
    harness.backend.pass_readouts.clear()
    for index in range(num_sequences):
        harness.add(str(index), [index] * (1 + 8 * index), 150, policy=policy)
    harness.finish()
    return sum(map(bool, harness.backend.pass_readouts)), len(harness.backend.pass_readouts)


@pytest.mark.parametrize(("num_sequences", "error_rate"), [(1, 1.0), (2, 1.0), (8, 1.0), (8, 0.5)])
def test_who_starts_together_reads_out_together_though_drafts_are_tried(
    num_sequences: int, error_rate: float
) -> None:
    """Drafts that aren't worth their heads add 5 % to the passes with one, a probe of each depth in 64
    tokens, or up to 11 % of a text that meets more of them. On random weights 8 texts had 3.7 times as many.
    """
    plain, passes = passes_that_read_out(num_sequences, "none", error_rate)
    assert plain <= passes / 4 + 1
    assert passes_that_read_out(num_sequences, "adaptive", error_rate)[0] <= 1.12 * plain


def test_drafts_that_save_a_head_are_read_in_passes_that_had_none() -> None:
    """Four perfect drafts at a time are worth their head: a pass a token, as if heads were free."""
    heads, passes = passes_that_read_out(4, "adaptive", 0.0)
    assert passes <= 1.05 * 150
    assert heads >= 0.98 * passes


def test_a_lone_text_whose_drafts_become_good_finds_out() -> None:
    """Useless for 100 tokens, perfect from then on: 200 tokens later it needs a pass a token."""
    harness = Harness(error_rate=1.0, cost=prices(1.0, 0.05, head=0.15))
    harness.add("a", [1], 400, policy="adaptive")
    while len(harness.text("a")) < 100:
        harness.step()
    harness.backend.error_rate = 0.0
    passes = len(harness.backend.pass_rows)
    while len(harness.text("a")) < 300:
        harness.step()
    assert len(harness.backend.pass_rows) - passes > 220  # it didn't know at once
    passes = len(harness.backend.pass_rows)
    harness.finish()
    assert len(harness.backend.pass_rows) - passes <= 105


def test_a_probe_leaves_the_wave_as_it_is() -> None:
    wave = Wave([5], 3, make_policy("adaptive", frozenset((1, 2))), length_limit=20)
    wave.enter_prompt(8)
    wave.runs[0].is_probed = True
    before = wave.policy.agreement.of(1)
    wave.update(wave.runs[:], {0: 10})
    assert (wave.tokens, len(wave.runs), wave.policy.agreement.of(1)) == ([5], 1, before)
    wave.runs[0].is_probed = False
    wave.update(wave.runs[:], {})
    assert wave.update(wave.runs[:], {0: 10}) == [10]
    assert wave.policy.agreement.of(1) > before
    assert (wave.accepted_drafts, wave.rejected_drafts) == (0, 0)


def test_prices_between_and_beyond_the_measured_points() -> None:
    cost = MeasuredCost(
        [1, 4], [100, 200], [[PassPrice(1, 0.1), PassPrice(2, 0.2)], [PassPrice(4, 0.5)] * 2], 9
    )
    assert cost.price(1, 50) == PassPrice(1, 0.1)
    assert cost.price(1, 150) == pytest.approx((1.5, 0.15, 0.0, 0.0))
    assert cost.price(2, 100) == pytest.approx((2.0, 0.1 + 0.4 / 3, 0.0, 0.0))
    assert cost.price(8, 900) == pytest.approx((6.0, 0.5, 0.0, 0.0))


def test_a_pass_of_a_lone_sequence_takes_few_calls() -> None:
    """Every pass waits for them: 143 calls of Python functions for a wave of four rows, once 234."""
    harness = Harness(error_rate=0.02)
    harness.add("a", [1, 2, 3], 200, policy="adaptive")
    calls, passes = 0, 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    while harness.scheduler.has_work:
        sys.setprofile(count)
        batch = harness.scheduler.schedule()
        sys.setprofile(None)
        result = harness.backend.run(batch)
        sys.setprofile(count)
        harness.scheduler.update(batch, result)
        sys.setprofile(None)
        passes += 1
    assert calls / passes <= 160
