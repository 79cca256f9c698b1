"""How the prompts that are being read share the passes. Pure Python.

A pass has a time to keep while anybody decodes; what the decoding rows leave of it goes to prompts, the
one that is due first. A prompt of N rows is due once N rows of any prompts were run since it was admitted.
So a newcomer that is shorter than the rest of it goes first, but less and less the more others have gone
first, and none that comes once it is due. A source that an encoder reads counts as rows of the pass in which
its sequence begins; it is never cut, and one that no pass has room for goes with no other. Invariant: where
any prompt waits, at least one row of a prompt runs in every pass; so every prompt is read.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from model.schedule.cost import PassCost
from model.schedule.sequence import Sequence
from model.schedule.wave import Wave

LEAST_SHARE = 4  # a prompt that others leave less than this part of a chunk waits: a run costs by itself, too
SLACK = 4  # a run that is over its room by this part of it isn't cut: the price isn't known better


class PromptRows(NamedTuple):
    """How many of its first runs each sequence runs, and what that comes to."""

    num_runs: dict[Sequence, int]
    rows: int
    milliseconds: float


class PromptSharing:
    """Chooses prompt rows, pass by pass; `rows_run` counts them."""

    def __init__(self, chunk_size: int, most_rows: int) -> None:
        """`chunk_size` positions of a prompt enter together at most; a pass reads `most_rows` rows."""
        self.chunk_size, self.most_rows = chunk_size, most_rows
        self.rows_run = 0

    def due(self, sequence: Sequence) -> int:
        """When a sequence that is admitted now is due, as a value of `rows_run`."""
        return self.rows_run + sequence.wave.num_rows_to_read + sequence.num_unread_source

    def take(self, readers: Iterable[Sequence], cost: PassCost, milliseconds: float) -> PromptRows:
        """What each of `readers` runs in so much time; enters and cuts their runs."""
        taken: dict[Sequence, int] = {}
        total, spent = 0, 0.0
        for sequence in sorted(readers, key=_turn):
            left, price = self.most_rows - total, cost.prompt_row(sequence.wave.num_complete)
            room = left if price * left <= milliseconds - spent else int((milliseconds - spent) / price)
            source = sequence.num_unread_source
            if source >= room and total:
                continue  # it is encoded in one piece, in a pass that has room for it or for nothing else
            room = max(room - source, not total)
            taken[sequence], rows = self._take(sequence.wave, room, is_first=not total)
            rows += source if rows else 0
            total += rows
            spent += rows * price
            if total >= self.most_rows or spent >= milliseconds:
                break
        self.rows_run += total
        return PromptRows(taken, total, spent)

    def _take(self, wave: Wave, room: int, is_first: bool) -> tuple[int, int]:
        """The first runs of a wave that fit into `room` rows, their number and rows.

        Of the prompt whose turn it is, something always fits.
        """
        num_runs = rows = 0
        while rows < room:
            is_first = is_first and not rows
            if num_runs == len(wave.runs) and not self._enter(wave, room - rows, is_first):
                break
            run = wave.runs[num_runs]
            if run.start >= wave.num_known:
                break  # a draft behind the prompt
            if run.num_rows > room - rows:
                if not is_first:
                    break
                if run.num_rows > room + room // SLACK and not wave.is_whole(run):
                    wave.split(num_runs, room)
            num_runs += 1
            rows += run.num_rows
        return num_runs, rows

    def _enter(self, wave: Wave, room: int, is_first: bool) -> bool:
        """Whether another chunk has entered, of at most `room` rows."""
        wanted = wave.next_chunk(self.chunk_size)
        least = wanted if wave.reads_whole else math.ceil(self.chunk_size / LEAST_SHARE)
        if room < wanted and not is_first and room < least:
            return False
        before = len(wave.runs)
        wave.enter_prompt(min(wanted, room))
        return len(wave.runs) > before


def _turn(sequence: Sequence) -> tuple[int, int, tuple[int, int, int]]:
    """The smallest first."""
    return sequence.request.priority, sequence.due, sequence.precedence
