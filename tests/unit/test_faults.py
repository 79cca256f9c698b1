"""What goes wrong in a pass ends whose fault it was, and nobody else; on the fake model."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.options import SchedulerLimits
from model.schedule.batch import ScheduledRun
from tests.fake_model import Harness


def names(batch: Sequence[ScheduledRun]) -> set[str]:
    return {run.sequence.request.request_id for run in batch}


def ends(harness: Harness, name: str) -> list[str | None]:
    return [event.finish_reason for event in harness.answers[name] if event.finish_reason]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=9),
    culprits=st.sets(st.integers(0, 8), max_size=3),
    at=st.integers(0, 12),
    chunk=st.integers(1, 20),
    max_num_seqs=st.integers(1, 6),
    num_pages=st.integers(14, 80),
    aborted=st.none() | st.integers(0, 8),
    aborted_at=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_who_breaks_passes_is_found_and_the_others_say_the_same(
    lengths: list[tuple[int, int]],
    culprits: set[int],
    at: int,
    chunk: int,
    max_num_seqs: int,
    num_pages: int,
    aborted: int | None,
    aborted_at: int,
) -> None:
    """Every pass with a culprit that has so many tokens fails, and does not say why."""
    limits = SchedulerLimits(max_num_seqs, prefill_chunk_size=chunk, prefill_rows=2 * chunk)
    harness = Harness(limits, num_pages)
    bad = {str(index) for index in culprits}
    failures = 0

    def inject(batch: Sequence[ScheduledRun]) -> None:
        nonlocal failures
        if any(run.sequence.num_generated >= at for run in batch if run.sequence.request.request_id in bad):
            failures += 1
            raise RuntimeError("broken")

    harness.backend.inject = inject
    for index, (length, max_tokens) in enumerate(lengths):
        harness.add(str(index), [index // 2] * length, max_tokens)
    for _ in range(aborted_at):
        harness.step()
    if str(aborted) in harness.answers and not ends(harness, str(aborted)):
        harness.abort(str(aborted))
    harness.finish()
    assert harness.pool.num_free_pages == num_pages
    assert failures <= 4 * len(lengths)
    for index, (length, max_tokens) in enumerate(lengths):
        expected = harness.backend.continue_plainly([index // 2] * length, max_tokens, frozenset())
        got = harness.text(str(index))
        assert len(ends(harness, str(index))) == 1
        assert got == expected[: len(got)]
        if index == aborted:
            continue
        if index in culprits and at < max_tokens:
            assert (ends(harness, str(index)), len(got)) == (["error"], at)
            assert harness.answers[str(index)][-1].error == "broken"
        else:
            assert got == expected


@pytest.mark.parametrize("num_sequences", [1, 2, 7, 32])
def test_a_pass_that_fails_once_ends_nobody(num_sequences: int) -> None:
    harness = Harness(SchedulerLimits(max_num_seqs=32))
    left = 1

    def inject(batch: Sequence[ScheduledRun]) -> None:
        nonlocal left
        if left and all(run.sequence.num_generated > 3 for run in batch):
            left -= 1
            raise RuntimeError("out of memory")

    harness.backend.inject = inject
    for index in range(num_sequences):
        harness.add(str(index), [index] * 9, 12)
    harness.finish()
    assert not left
    for index in range(num_sequences):
        assert harness.text(str(index)) == harness.backend.continue_plainly([index] * 9, 12, frozenset())


def test_passes_that_are_too_large_are_halved_and_nobody_is_at_fault() -> None:
    """Memory for five sequences of eight: each gets its text."""
    harness = Harness()
    sizes: list[int] = []

    def inject(batch: Sequence[ScheduledRun]) -> None:
        sizes.append(len(names(batch)))
        if sizes[-1] > 5 and len(sizes) > 3:
            raise RuntimeError("out of memory")

    harness.backend.inject = inject
    for index in range(8):
        harness.add(str(index), [index], 6)
    for _ in range(2000):
        if not harness.scheduler.has_work:
            break
        harness.step()
    for index in range(8):
        assert harness.text(str(index)) == harness.backend.continue_plainly([index], 6, frozenset())


def test_a_lone_culprit_is_found_in_a_few_passes_that_fail() -> None:
    """32 sequences: five halvings and two strikes."""
    harness = Harness(SchedulerLimits(max_num_seqs=32))
    failures = 0

    def inject(batch: Sequence[ScheduledRun]) -> None:
        nonlocal failures
        if "13" in names(batch) and harness.text("0"):
            failures += 1
            raise RuntimeError("broken")

    harness.backend.inject = inject
    for index in range(32):
        harness.add(str(index), [index] * 5, 10)
    harness.finish()
    assert failures == 7
    assert ends(harness, "13") == ["error"]


def test_a_fault_that_names_its_sequence_ends_it_within_the_pass() -> None:
    """Nobody is read again; what the culprit left in the cache is forgotten."""
    harness = Harness(SchedulerLimits(prefill_chunk_size=8, prefill_rows=32))

    def inject(batch: Sequence[ScheduledRun]) -> None:
        for run in batch:
            if run.sequence.request.request_id == "b" and run.sequence.num_generated == 5:
                harness.backend.faults[run.sequence] = "nan"

    for name in "abc":
        harness.add(name, [ord(name)] * 9, 12)
    harness.backend.inject = inject
    positions: list[int] = []
    harness.finish(
        lambda batch: positions.extend(run.start for run in batch if run.sequence.request.request_id == "a")
    )
    assert positions.count(0) == 4  # loops
    assert (ends(harness, "b"), harness.answers["b"][-1].error) == (["error"], "nan")
    assert harness.text("b") == harness.backend.continue_plainly([ord("b")] * 9, 5, frozenset())
    for name in "ac":
        assert harness.text(name) == harness.backend.continue_plainly([ord(name)] * 9, 12, frozenset())
    harness.backend.inject = lambda _: None
    harness.add("again", [ord("b")] * 9, 1)
    harness.finish()
    assert harness.stats("again").cached_prompt_tokens == 0


def test_an_error_while_one_wave_takes_in_its_results_costs_the_others_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness = Harness()
    for name in "abc":
        harness.add(name, [ord(name)] * 8, 20)
    for _ in range(8):
        harness.step()
    wave = next(seq.wave for seq in harness.scheduler.running if seq.request.request_id == "b")

    def broken(*_: object) -> list[int]:
        raise IndexError("list index out of range")

    monkeypatch.setattr(wave, "update", broken)
    passes = len(harness.backend.pass_rows)
    harness.finish()
    assert (ends(harness, "b"), harness.answers["b"][-1].error) == (
        ["error"],
        "IndexError: list index out of range",
    )
    assert len(harness.backend.pass_rows) - passes < 4 * 20
    for name in "ac":
        assert harness.text(name) == harness.backend.continue_plainly([ord(name)] * 8, 20, frozenset())


def test_an_error_while_a_pass_is_made_is_found_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    for name in "abc":
        harness.add(name, [ord(name)] * 8, 20)
    for _ in range(8):
        harness.step()
    wave = next(seq.wave for seq in harness.scheduler.running if seq.request.request_id == "b")

    def broken(*_: object) -> int:
        raise RuntimeError("broken")

    monkeypatch.setattr(wave, "num_readouts", broken)
    harness.finish()
    assert ends(harness, "b") == ["error"]
    for name in "ac":
        assert harness.text(name) == harness.backend.continue_plainly([ord(name)] * 8, 20, frozenset())


def on_trial(max_num_seqs: int) -> Harness:
    """Eight sequences of which all were in a pass that failed; so many at a time are tried."""
    harness = Harness()
    for index in range(8):
        harness.add(str(index), [index] * 9, 6)
    for _ in range(6):
        harness.step()
    harness.scheduler.retry("broken")
    harness.scheduler.limits = SchedulerLimits(max_num_seqs)
    return harness


def test_one_that_is_aborted_before_its_trial_is_not_waited_for() -> None:
    harness = on_trial(max_num_seqs=2)
    for name in ("1", "7"):
        harness.abort(name)
    for _ in range(500):
        harness.step()
    assert not harness.scheduler.has_work
    assert [ends(harness, str(index)) for index in range(8)] == [
        ["abort"] if index in {1, 7} else ["length"] for index in range(8)
    ]


def test_those_who_wait_for_pages_in_a_trial_that_fails_are_tried_later() -> None:
    harness = on_trial(max_num_seqs=2)
    harness.step()
    assert harness.scheduler.num_waiting == 6
    harness.scheduler.retry("broken again")
    harness.finish()
    for index in range(8):
        assert harness.text(str(index)) == harness.backend.continue_plainly([index] * 9, 6, frozenset())
