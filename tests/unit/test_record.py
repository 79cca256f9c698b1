"""The record of a wave: it changes nothing, says what happened, and is bounded."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from model.options import POLICIES, SchedulerLimits
from model.protocol import MOST_WAVE_PASSES, WavePass, WaveRecord
from model.schedule.batch import ScheduledRun
from model.schedule.drafts import make_policy
from model.schedule.record import WaveRecorder
from model.schedule.wave import Wave
from tests.fake_model import Harness

CASE = {
    "num_loops": st.integers(1, 5),
    "policy": st.sampled_from(POLICIES),
    "error_rate": st.sampled_from([0.0, 0.3, 1.0]),
    "memory": st.sampled_from([None, 1, 2]),
    "num_pages": st.sampled_from([12, 400]),  # of 4 positions: 12 hold one of the two texts
}


class Watched:
    """A text of 30 tokens beside another one, with the batches that ran and what the record says."""

    def __init__(
        self,
        *,
        num_loops: int,
        policy: str,
        error_rate: float,
        memory: int | None,
        num_pages: int,
        include_wave: bool = True,
    ) -> None:
        self.harness = Harness(error_rate=error_rate, memory=memory, num_pages=num_pages)
        for name in ("a", "b"):
            depths = tuple(range(1, num_loops))
            self.harness.add(
                name,
                [1, 2, ord(name)],
                30,
                num_loops=num_loops,
                policy=policy,
                draft_depths=depths,
                include_wave=include_wave,
            )
        self.batches: list[list[ScheduledRun]] = []
        self.harness.finish(self.batches.append)

    @property
    def records(self) -> list[WaveRecord]:
        return [event.wave for event in self.harness.answers["a"] if event.wave is not None]

    @property
    def passes(self) -> list[WavePass]:
        assert not any(record.omitted for record in self.records)
        return [one for record in self.records for one in record.passes]

    def runs_of_a(self) -> list[list[ScheduledRun]]:
        """The batches' runs of the text, those that ran it alone."""
        mine = ([run for run in batch if run.sequence.request.request_id == "a"] for batch in self.batches)
        return [runs for runs in mine if runs]


@given(**CASE)
@settings(max_examples=40, deadline=None)
def test_recording_changes_no_token_pass_or_row(
    num_loops: int, policy: str, error_rate: float, memory: int | None, num_pages: int
) -> None:
    case = {"num_loops": num_loops, "policy": policy, "error_rate": error_rate}
    on, off = (
        Watched(**case, memory=memory, num_pages=num_pages, include_wave=wanted).harness  # type: ignore[arg-type]
        for wanted in (True, False)
    )
    assert [event.token_ids for event in on.answers["a"]] == [event.token_ids for event in off.answers["a"]]
    assert on.backend.pass_rows == off.backend.pass_rows
    assert on.backend.pass_readouts == off.backend.pass_readouts
    assert all(event.wave is None for event in off.answers["a"])


@given(**CASE)
@settings(max_examples=40, deadline=None)
def test_the_record_says_what_ran_and_what_became_final(
    num_loops: int, policy: str, error_rate: float, memory: int | None, num_pages: int
) -> None:
    case = Watched(
        num_loops=num_loops, policy=policy, error_rate=error_rate, memory=memory, num_pages=num_pages
    )
    passes, ran = case.passes, case.runs_of_a()
    assert [sorted(one.runs) for one in passes] == [
        sorted((run.start, run.num_rows, run.loop + 1) for run in runs) for runs in ran
    ]
    text = [token.token_id for one in passes for token in one.committed]
    assert text == case.harness.text("a")
    position = 3  # behind the prompt
    for one in passes:
        assert one.position == position
        position += len(one.committed)
    assert {record.num_loops for record in case.records} == {num_loops}


@given(**CASE)
@settings(max_examples=40, deadline=None)
def test_guesses_are_what_each_loop_says_behind_the_final_text(
    num_loops: int, policy: str, error_rate: float, memory: int | None, num_pages: int
) -> None:
    """Those of rows that were flushed are not among them."""
    case = Watched(
        num_loops=num_loops, policy=policy, error_rate=error_rate, memory=memory, num_pages=num_pages
    )
    sequence = case.runs_of_a()[0][0].sequence
    for one in case.passes:
        for position, token in enumerate(one.committed, start=one.position):
            depths = [depth for depth, _ in token.guesses]
            assert depths == sorted(set(depths))
            assert token.guesses[-1] == (num_loops, token.token_id)
            for depth, guess in token.guesses:
                row = ScheduledRun(sequence, position - 1, 1, depth - 1, 1)
                assert guess == case.harness.backend._token(row, position - 1)


@given(**CASE)
@settings(max_examples=40, deadline=None)
def test_a_flush_is_told_where_a_draft_changed_and_only_there(
    num_loops: int, policy: str, error_rate: float, memory: int | None, num_pages: int
) -> None:
    case = Watched(
        num_loops=num_loops, policy=policy, error_rate=error_rate, memory=memory, num_pages=num_pages
    )
    for before, one in pairwise(case.passes):
        now = [token.token_id for token in one.committed] + one.drafts
        same = [old == new for old, new in zip(before.drafts, now, strict=False)]
        if one.flushed is None:  # read again after it made way for the other text, drafts are forgotten
            assert all(same) or case.harness.stats("a").preemptions
        else:
            position, depth = one.flushed
            assert same.index(False) == position - one.position
            assert 1 <= depth <= num_loops


def test_flushes_are_as_many_as_the_scheduler_counts() -> None:
    case = Watched(num_loops=4, policy="recheck", error_rate=0.5, memory=None, num_pages=400)
    others = (one for event in case.harness.answers["b"] if event.wave for one in event.wave.passes)
    depths = [one.flushed[1] for one in [*case.passes, *others] if one.flushed]
    counted = case.harness.scheduler.counts.flushes
    assert counted
    assert {depth: depths.count(depth) for depth in set(depths)} == dict(counted)


def test_what_was_said_behind_a_flushed_token_is_forgotten() -> None:
    """The row enters again behind another token, and its early loops may not be read out this time."""
    wave = Wave([5], 3, make_policy("single", frozenset((1,))), length_limit=20)
    recorder = WaveRecorder(wave)
    wave.enter_prompt(8)
    for predictions in ({0: 10}, {1: 11}, {0: 99, 2: 12}, {}, {}, {1: 42}):
        recorder.update(wave.runs[:], predictions)
    passes = recorder.take().passes
    assert [one.flushed for one in passes] == [None, None, (1, 3), None, None, None]
    assert [one.drafts for one in passes[:3]] == [[10], [10, 11], []]
    assert [token.guesses for one in passes for token in one.committed] == [[(1, 10), (3, 99)], [(3, 42)]]


def test_of_a_long_prompt_only_the_latest_passes_are_kept() -> None:
    harness = Harness(SchedulerLimits(prefill_chunk_size=1))
    harness.add("a", [*range(40)] * 5, 3, include_wave=True)
    harness.finish()
    records = [event.wave for event in harness.answers["a"] if event.wave]
    assert len(records[0].passes) == MOST_WAVE_PASSES
    assert records[0].omitted > MOST_WAVE_PASSES
    assert sum(len(one.passes) + one.omitted for one in records) == len(harness.backend.pass_rows)


@given(st.lists(st.tuples(st.integers(0, MOST_WAVE_PASSES), st.integers(0, 3)), min_size=1, max_size=8))
def test_records_that_are_joined_lose_the_oldest_passes_and_count_them(sizes: list[tuple[int, int]]) -> None:
    numbers, records = iter(range(10_000)), []
    for num_passes, omitted in sizes:
        _ = [next(numbers) for _ in range(omitted)]
        passes = [WavePass([], next(numbers), [], [], None) for _ in range(num_passes)]
        records.append(WaveRecord(4, passes, omitted))
    joined = records[0]
    for record in records[1:]:
        joined = joined.followed_by(record)
    assert joined.omitted + len(joined.passes) == next(numbers)
    assert len(joined.passes) <= MOST_WAVE_PASSES
    kept = [one.position for one in joined.passes]
    assert kept == list(range(joined.omitted, joined.omitted + len(kept)))  # the latest, without a gap
    assert joined.followed_by(None) == joined
