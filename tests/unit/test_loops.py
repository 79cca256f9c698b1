"""What single loops say, and exits by the gate, on a model made of hashes.

The fake backend checks of each final token that what was kept of its row's earlier loops is that row's,
behind the very tokens that stand there now.
"""

import random

import pytest

from model.options import POLICIES, SchedulerLimits
from model.protocol import TokenEvent
from model.schedule.batch import ScheduledRun
from model.schedule.cost import FixedBudget
from tests.fake_model import Harness

NEW_TOKENS = 20


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(50) for _ in range(rng.randint(1, 30))] for _ in range(count)]


def num_loops_told(events: list[TokenEvent]) -> list[int]:
    """Of each token, the loops that speak of it."""
    for event in events:
        assert len(event.loop_logprobs) == len(event.token_ids)
    return [len(loops) for event in events for loops in event.loop_logprobs]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_pages", [400, 20], ids=["room", "pre-empted"])
def test_every_loop_speaks_of_every_token_whatever_is_flushed_or_pre_empted(
    policy: str, num_pages: int
) -> None:
    """Wrong drafts, proposals from the text, chunks of a prompt; requests that don't ask are told nothing."""
    limits = SchedulerLimits(prefill_chunk_size=7, max_num_seqs=6)
    harness = Harness(limits, num_pages=num_pages, error_rate=0.5, memory=2)
    for index, prompt in enumerate(prompts(6)):
        asked = 0 if index % 2 else None
        harness.add(str(index), prompt, NEW_TOKENS, policy=policy, loop_logprobs=asked)
    harness.finish()
    assert (harness.scheduler.counts.preemptions > 0) == (num_pages == 20)
    for index, prompt in enumerate(prompts(6)):
        expected = harness.backend.continue_plainly(prompt, NEW_TOKENS, frozenset())
        assert harness.text(str(index)) == expected
        if index % 2:
            assert num_loops_told(harness.answers[str(index)]) == [4] * NEW_TOKENS
        else:
            assert not any(event.loop_logprobs for event in harness.answers[str(index)])


def test_what_is_kept_of_a_row_goes_when_its_token_is_final() -> None:
    harness = Harness(error_rate=0.5)
    harness.add("a", [1, 2, 3], 200, loop_logprobs=0)
    most = 0

    def watch(batch: list[ScheduledRun]) -> None:
        nonlocal most
        most = max([most, *(len(run.sequence.head_inputs) for run in batch)])

    harness.finish(watch)
    assert len(harness.text("a")) == 200
    assert 0 < most <= 20  # the rows of a wave, and those of one flush


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("num_pages", [400, 20], ids=["room", "pre-empted"])
def test_a_token_is_that_of_the_loop_where_the_gate_has_stopped(threshold: float, num_pages: int) -> None:
    """Alone and beside others that go through all loops, under a budget of rows that all fight for."""
    limits = SchedulerLimits(prefill_chunk_size=7, max_num_seqs=6)
    harness = Harness(limits, num_pages=num_pages, error_rate=0.5, cost=FixedBudget(9))
    for index, prompt in enumerate(prompts(6)):
        asked = threshold if index % 2 else None
        harness.add(
            str(index),
            prompt,
            NEW_TOKENS,
            policy="none" if asked else "adaptive",
            loop_logprobs=0,
            exit_threshold=asked,
        )
    harness.finish()
    left = list[int]()
    for index, prompt in enumerate(prompts(6)):
        tokens, exits = harness.backend.continue_by_gate(prompt, NEW_TOKENS, 4, threshold)
        if index % 2 == 0:
            tokens, exits = (
                harness.backend.continue_plainly(prompt, NEW_TOKENS, frozenset()),
                [4] * NEW_TOKENS,
            )
        else:
            left += exits
        assert harness.text(str(index)) == tokens
        assert num_loops_told(harness.answers[str(index)]) == exits
    assert len(set(left)) > 1 or threshold < 0.1


def test_the_next_token_begins_where_the_gate_stops() -> None:
    """Passes are those up to each exit, not all loops: what is behind runs beside the tokens that follow."""
    harness = Harness(error_rate=0.5)
    harness.add("a", [1, 2, 3], 100, policy="none", exit_threshold=0.5)
    harness.finish()
    _, exits = harness.backend.continue_by_gate([1, 2, 3], 100, 4, 0.5)
    stats = harness.stats("a")
    assert stats.passes == sum(exits[1:])  # the first token comes of reading the prompt
    assert (stats.accepted_drafts, stats.rejected_drafts) == (0, 0)
    assert sum(exits) < 300


@pytest.mark.parametrize("length", [1, 2, 8, 20])
def test_a_last_token_that_enters_alone_finds_all_before_it_final(length: int) -> None:
    harness = Harness(SchedulerLimits(prefill_chunk_size=7))
    prompt = list(range(length))
    harness.add("a", prompt, 5, policy="none", loop_logprobs=0, ends_alone=True)
    done: dict[int, int] = {}  # loops of each position

    def watch(batch: list[ScheduledRun]) -> None:
        for run in batch:
            if run.start <= length - 1 < run.start + run.num_rows:
                assert run.num_rows == 1
                assert [done.get(position) for position in range(length - 1)] == [4] * (length - 1)
        for run in batch:
            for position in range(run.start, run.start + run.num_rows):
                done[position] = run.loop + 1

    harness.finish(watch)
    assert harness.text("a") == harness.backend.continue_plainly(prompt, 5, frozenset())
    assert num_loops_told(harness.answers["a"]) == [4] * 5
