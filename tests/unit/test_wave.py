"""The SPEED state machine alone: passes per token, flushes, ends, for every policy of draft depths."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.options import POLICIES
from model.schedule.drafts import make_policy, policy_depths
from model.schedule.wave import Outcome, Unconstrained, Wave
from tests.fake_model import Harness, mixed
from tests.loose import Field


def decode(
    draft_depths: tuple[int, ...],
    error_rate: float,
    error_depths: range = range(1, 4),
    count: int = 60,
    policy: str | None = None,
    memory: int | None = None,
) -> tuple[Harness, float]:
    """By default compares at the given depths and at no other."""
    harness = Harness(error_rate=error_rate, error_depths=error_depths, memory=memory)
    policy = policy or ("single" if len(draft_depths) == 1 else "recheck")
    harness.add("a", [1, 2, 3], count, draft_depths=draft_depths, policy=policy)
    harness.finish()
    return harness, harness.stats("a").passes / (count - 1)


def test_perfect_drafts_need_one_pass_a_token() -> None:
    assert decode((1,), error_rate=0.0)[1] == 1.0


def test_a_draft_at_depth_two_needs_two_passes_a_token() -> None:
    assert decode((2,), error_rate=0.0)[1] == 2.0


def test_no_drafts_need_a_pass_for_every_loop() -> None:
    harness, passes_per_token = decode((), error_rate=0.0)
    assert passes_per_token == 4.0
    assert harness.backend.pass_rows[-1] == 1


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
    policy=st.sampled_from(POLICIES),
    memory=st.sampled_from([None, 1, 2, 3]),
    error_rate=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    max_tokens=st.integers(1, 30),
    ending=st.frozensets(st.integers(0, 49), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_every_policy_commits_what_plain_decoding_gives(
    prompt: list[int],
    num_loops: int,
    draft_depths: set[int],
    policy: str,
    memory: int | None,
    error_rate: float,
    max_tokens: int,
    ending: frozenset[int],
) -> None:
    """Also: the length limit and ending tokens end it, and the accepted drafts are counted."""
    harness = Harness(error_rate=error_rate, memory=memory)
    depths = tuple(sorted(draft_depths))
    options: dict[str, Field] = {"num_loops": num_loops, "draft_depths": depths, "policy": policy}
    harness.add("a", prompt, max_tokens, ending=ending, **options)
    harness.finish()
    expected = harness.backend.continue_plainly(prompt, max_tokens, ending)
    assert harness.text("a") == expected
    last = harness.answers["a"][-1]
    assert last.finish_reason == ("stop" if expected[-1] in ending else "length")
    assert last.stats is not None
    assert last.stats.accepted_drafts <= len(expected)


def test_a_flush_drops_the_rows_behind_it_and_nothing_else() -> None:
    wave = Wave([5], 3, make_policy("single", frozenset((1,))), length_limit=20)
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
    harness.add("a", [1], max_tokens=3, policy="single")
    positions: set[int] = set()
    harness.finish(lambda batch: positions.update(run.start for run in batch))
    assert positions == {0, 1, 2}


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_prompt_chunks_follow_each_other_one_loop_apart(chunk: int) -> None:
    wave = Wave(list(range(8)), 3, make_policy("none", frozenset()), length_limit=9)
    passes = 0
    while not wave.finished:
        wave.enter_prompt(chunk)
        wave.update(wave.runs[:], {7: mixed(1) % 50} if wave.num_readouts(wave.runs[0]) else {})
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
    wave = Wave(list(range(30)), 3, make_policy("none", frozenset()), length_limit=40)
    for _ in range(5):
        wave.enter_prompt(4)  # and no pass runs it
    assert [(run.start, run.num_rows) for run in wave.runs] == [(0, 4)]


def test_text_that_repeats_itself_needs_less_than_a_pass_a_token() -> None:
    """Each token depends on the last two, so the text runs into a circle that an n-gram finds."""
    assert decode((1, 2, 3), 0.3, count=200, policy="lookup", memory=1)[1] < 0.7
    assert decode((1, 2, 3), 0.3, count=200, policy="adaptive", memory=1)[1] < 0.7
    assert decode((1, 2, 3), 0.3, count=200, policy="recheck", memory=1)[1] > 1.0


def test_lookup_costs_no_rows_where_nothing_repeats() -> None:
    rows = {
        policy: decode((1, 2, 3), 0.3, policy=policy)[0].stats("a").rows for policy in ("recheck", "lookup")
    }
    assert rows["lookup"] <= 1.1 * rows["recheck"]


@pytest.mark.parametrize(
    ("name", "num_loops", "default", "given", "depths"),
    [
        ("none", 4, (1, 2), None, set()),
        ("single", 4, (1, 2), None, {1}),
        ("gated", 4, (1, 2), None, {1, 2}),
        ("recheck", 4, (1, 2), None, {1, 2, 3}),
        ("adaptive", 4, (1, 2), (2,), {2}),
        ("recheck", 32, (2, 8), None, {2, 8}),
        ("adaptive", 2, (1, 2), (1, 3), {1}),
        ("adaptive", 1, (), None, set()),
    ],
)
def test_draft_depths_of_a_policy(
    name: str, num_loops: int, default: tuple[int, ...], given: tuple[int, ...] | None, depths: set[int]
) -> None:
    assert policy_depths(name, num_loops, default, given) == depths


def test_a_restart_forgets_drafts_and_goes_on_from_what_is_committed() -> None:
    wave = Wave([5], 3, make_policy("single", frozenset((1,))), length_limit=20)
    wave.enter_prompt(8)
    for predictions in ({0: 10}, {1: 11}, {0: 10, 2: 12}):
        wave.update(wave.runs[:], predictions)
    wave.restart()
    assert (wave.tokens, wave.runs, wave.num_committed, wave.is_reading_prompt) == ([5, 10], [], 2, True)
    wave.enter_prompt(8)
    assert [(run.start, run.num_rows) for run in wave.runs] == [(0, 2)]
    assert wave.num_readouts(wave.runs[0]) == 1


class _Wavering(Unconstrained):
    """Calls a token stuck once and open from then on, as a matcher at its limits can."""

    def __init__(self) -> None:
        self._asked: set[int] = set()

    def outcome(self, tokens: list[int], position: int, token: int, **_: bool) -> Outcome:
        first = position not in self._asked
        self._asked.add(position)
        return "stuck" if first else "open"


@pytest.mark.parametrize("policy", ["single", "recheck", "adaptive"])
def test_a_draft_that_was_not_followed_up_is_when_it_is_confirmed(policy: str) -> None:
    """A draft called stuck had no row; confirmed and open, it left a wave without rows: IndexError."""
    harness = Harness(error_rate=0.0)
    harness.add("a", [1, 2, 3], 12, policy=policy)
    harness.scheduler._waiting.first().wave.constraint = _Wavering()  # type: ignore[union-attr]
    harness.finish()
    assert harness.text("a") == harness.backend.continue_plainly([1, 2, 3], 12, frozenset())
