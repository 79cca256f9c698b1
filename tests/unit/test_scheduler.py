"""Many sequences at once on the fake model: order, budgets, aborts, memory."""

from hypothesis import given, settings
from hypothesis import strategies as st

from model.scheduler import SchedulerLimits
from model.sequence import ScheduledRun
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
)
@settings(max_examples=200, deadline=None)
def test_any_schedule_gives_every_request_its_own_text_and_one_end(
    arrivals: list[Arrival],
    aborts: list[tuple[int, int]],
    row_budget: int,
    chunk: int,
    max_num_seqs: int,
    num_pages: int,
) -> None:
    """Invariants 1, 3, 4, 5 and 6 of the design, under random arrivals, aborts, budgets and memory."""
    limits = SchedulerLimits(
        max_num_seqs, prefill_chunk_size=chunk, prefill_rows=2 * chunk, row_budget=row_budget
    )
    harness = Harness(limits, num_pages)
    prompts = [[index] * length for index, (length, _, _) in enumerate(arrivals)]
    aborted = {index for index, _ in aborts if index < len(arrivals)}
    for now in range(71):
        for index, (_, max_tokens, due) in enumerate(arrivals):
            if due == now:
                harness.add(str(index), prompts[index], max_tokens, draft_depths=(1, 2))
        for index, due in aborts:
            if due == now and str(index) in harness.answers:
                harness.abort(str(index))
        harness.step()
    harness.finish()
    assert harness.pool.num_free_pages == num_pages
    for index, (_, max_tokens, _) in enumerate(arrivals):
        expected = harness.runner.continue_plainly(prompts[index], max_tokens, frozenset())
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
    harness.add("a", [1], 60, draft_depths=())
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
    harness = Harness(SchedulerLimits(row_budget=5), error_rate=0.0)
    for name in "abc":
        harness.add(name, [ord(name)], 40)
    for _ in range(5):
        harness.step()
    sizes = {sum(run.num_rows for run in harness.step()) for _ in range(20)}
    assert sizes == {5}


def test_under_saturation_waves_narrow_to_one_row() -> None:
    harness = Harness(SchedulerLimits(row_budget=1), error_rate=0.0)
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
