"""Which rows of a pass are read out: those of the last depth, and the drafts that are worth it. Pure Python.

A pass without readouts spares the head: 0.2 to 0.5 ms of 2 to 5 on the embedded model. Sequences that
start together read out together, in one pass of R, so a draft in another pass has to be worth the whole
head, not just a row of it; where it isn't, it is not even made to learn what drafts are worth. Such
probes wait for a pass that has readouts anyway, or until nothing has been known of a depth for long.
Invariant: a probe changes nothing but what is known, so what stood in step stays in step.
"""

from collections import abc
from typing import NamedTuple

from model.schedule.cost import Outlay
from model.schedule.drafts import PROBE_EVERY
from model.schedule.sequence import Sequence
from model.schedule.wave import Run, Wave


class _Candidate(NamedTuple):
    """Rows that this pass can read out: the last `num_rows` of a run, at `depth` after the pass."""

    wave: Wave
    run: Run
    num_rows: int
    depth: int

    @property
    def is_draft(self) -> bool:
        return self.depth < self.wave.first_committing_depth

    def is_worth(self, outlay: Outlay) -> bool:
        """Whether it is read out if the pass has a head."""
        if self.depth >= self.wave.first_committing_depth:
            return True
        loops_ahead = self.wave.num_loops - self.depth
        return self.wave.policy.reads(self.depth, outlay.least_agreement_of_readout(loops_ahead))

    def saved(self, outlay: Outlay) -> float:
        """Milliseconds that a draft saves, but for the head's."""
        wave, run = self.wave, self.run
        return outlay.saved_by_readout(
            wave.added_agreement(run), wave.num_loops - self.depth, wave.starts_row(run)
        )


class ReadoutChooser:
    """Chooses the readouts of every pass; remembers when each draft depth was last read."""

    def __init__(self) -> None:
        self._passes = 0
        self._last_read: dict[int, int] = {}  # draft depth -> pass

    def choose(self, in_pass: abc.Sequence[tuple[Sequence, list[Run]]], outlay: Outlay) -> None:
        """Tells each wave which of its runs are read out in this pass, and whether as a probe."""
        self._passes += 1
        able: list[_Candidate] = []
        for sequence, runs in in_pass:
            for run in runs:
                if num_rows := sequence.wave.num_readouts(run):
                    able.append(_Candidate(sequence.wave, run, num_rows, run.depth + 1))
        worthy = [candidate for candidate in able if candidate.is_worth(outlay)]
        chosen = worthy if _pay_for_head(worthy, outlay) else []
        for one in chosen:
            one.wave.read_out(one.run, one.num_rows)
        for one in able:
            if not one.run.num_read and self._is_due(one, bool(chosen)):
                one.wave.read_out(one.run, one.num_rows, is_probe=True)
        for one in able:
            if one.run.num_read:
                self._last_read[one.depth] = self._passes

    def _is_due(self, candidate: _Candidate, has_head: bool) -> bool:
        """Whether a readout that isn't worth it as a draft is to be made as a probe."""
        if not candidate.wave.policy.is_thrifty:
            return False
        unread = self._passes - self._last_read.get(candidate.depth, 0)
        is_overdue = unread >= PROBE_EVERY * candidate.wave.num_loops
        return is_overdue or (has_head and candidate.run.start % PROBE_EVERY == 0)


def must_read(wave: Wave, num_runs: int) -> bool:
    """Whether a pass over the first `num_runs` of the wave has a readout that may commit."""
    first = wave.first_committing_depth
    return any(wave.num_readouts(run) for run in wave.runs[:num_runs] if run.depth + 1 >= first)


def _pay_for_head(worthy: list[_Candidate], outlay: Outlay) -> bool:
    """Whether the pass has a head: it must, some policy asks for drafts at any price, or they save it."""
    if any(not one.is_draft or not one.wave.policy.is_thrifty for one in worthy):
        return True
    if not worthy:
        return False
    # Drafts that hold put sequences out of step: heads in as many passes of R as there are sequences.
    num_heads = min(len({one.wave for one in worthy}), worthy[0].wave.num_loops)
    return sum(max(0.0, one.saved(outlay)) for one in worthy) >= outlay.head * num_heads
