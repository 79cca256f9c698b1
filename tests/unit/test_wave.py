"""The SPEED state machine alone: passes per token, flushes, ends, for every policy of draft depths."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.wave import Wave
from tests.fake_model import Harness, mixed


def decode(
    draft_depths: tuple[int, ...], error_rate: float, error_depths: range = range(1, 4), count: int = 60
) -> tuple[Harness, float]:
    harness = Harness(error_rate=error_rate, error_depths=error_depths)
    harness.add("a", [1, 2, 3], count, draft_depths=draft_depths)
    harness.finish()
    stats = harness.answers["a"][-1].stats
    assert stats is not None
    return harness, stats.passes / (count - 1)


def test_perfect_drafts_need_one_pass_a_token() -> None:
    assert decode((1,), error_rate=0.0)[1] == 1.0


def test_a_draft_at_depth_two_needs_two_passes_a_token() -> None:
    assert decode((2,), error_rate=0.0)[1] == 2.0


def test_no_drafts_need_a_pass_for_every_loop() -> None:
    harness, passes_per_token = decode((), error_rate=0.0)
    assert passes_per_token == 4.0
    assert harness.runner.pass_rows[-1] == 1


def test_drafts_that_are_always_wrong_cost_no_passes() -> None:
    assert decode((1,), error_rate=1.0)[1] == 4.0


def test_a_later_draft_depth_mends_an_early_mistake_before_the_last_loop() -> None:
    only_the_first = range(1, 2)
    mended = decode((1, 2), 0.4, only_the_first)[1]
    assert mended < decode((1,), 0.4, only_the_first)[1]


@given(
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=30),
    num_loops=st.integers(1, 6),
    draft_depths=st.sets(st.integers(1, 6)),
    error_rate=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    max_tokens=st.integers(1, 30),
    ending=st.frozensets(st.integers(0, 49), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_every_policy_commits_what_plain_decoding_gives(
    prompt: list[int],
    num_loops: int,
    draft_depths: set[int],
    error_rate: float,
    max_tokens: int,
    ending: frozenset[int],
) -> None:
    """Also: the length limit and ending tokens end it, and the accepted drafts are counted."""
    harness = Harness(error_rate=error_rate)
    depths = tuple(sorted(draft_depths))
    harness.add("a", prompt, max_tokens, num_loops=num_loops, draft_depths=depths, ending=ending)
    harness.finish()
    expected = harness.runner.continue_plainly(prompt, max_tokens, ending)
    assert harness.text("a") == expected
    last = harness.answers["a"][-1]
    assert last.finish_reason == ("stop" if expected[-1] in ending else "length")
    assert last.stats is not None
    assert last.stats.accepted_drafts <= len(expected)


def test_a_flush_drops_the_rows_behind_it_and_nothing_else() -> None:
    wave = Wave([5], num_loops=3, draft_depths=(1,), length_limit=20)
    wave.enter_prompt(8)
    wave.update(wave.runs[:], {0: 10})  # depth 1 drafts token 1
    wave.update(wave.runs[:], {1: 11})  # and its row drafts token 2
    assert [(run.start, run.depth) for run in wave.runs] == [(0, 2), (1, 1), (2, 0)]
    committed = wave.update(wave.runs[:], {0: 99, 2: 12})  # depth 3 contradicts token 1
    assert committed == [99]
    assert wave.tokens == [5, 99]
    assert [(run.start, run.depth) for run in wave.runs] == [(1, 0)]
    assert (wave.accepted_drafts, wave.rejected_drafts) == (0, 2)


def test_no_row_runs_for_a_token_that_nobody_needs() -> None:
    """The last token of a sequence needs no row: it predicts nothing."""
    harness = Harness(error_rate=0.0)
    harness.add("a", [1], max_tokens=3, draft_depths=(1,))
    positions = set()
    harness.finish(lambda batch: positions.update(run.start for run in batch))
    assert positions == {0, 1, 2}


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_prompt_chunks_follow_each_other_one_loop_apart(chunk: int) -> None:
    wave = Wave(list(range(8)), num_loops=3, draft_depths=(), length_limit=9)
    passes = 0
    while not wave.finished:
        wave.enter_prompt(chunk)
        wave.update(wave.runs[:], {7: mixed(1) % 50} if wave.wants_readout(wave.runs[0]) else {})
        passes += 1
    assert passes == -(-8 // chunk) + 2


def test_drafts_are_counted_when_they_are_confirmed_and_when_they_are_dropped() -> None:
    """All but the last token, which nobody drafts: a row behind it would predict nothing."""
    stats = decode((1,), error_rate=0.0)[0].answers["a"][-1].stats
    assert stats is not None
    assert (stats.accepted_drafts, stats.rejected_drafts) == (59, 0)
    wrong = decode((1,), error_rate=1.0)[0].answers["a"][-1].stats
    assert wrong is not None
    assert wrong.accepted_drafts == 0
    assert wrong.rejected_drafts >= 59


def test_a_stalled_prompt_does_not_pile_up_chunks() -> None:
    wave = Wave(list(range(30)), num_loops=3, draft_depths=(), length_limit=40)
    for _ in range(5):
        wave.enter_prompt(4)  # and no pass runs it
    assert [(run.start, run.num_rows) for run in wave.runs] == [(0, 4)]
