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


class _Room(NamedTuple):
    """What a pass has left for prompts: so many rows, and what is not spent of its milliseconds."""

    rows: int
    milliseconds: float
    spent: float = 0.0

    def at(self, price: float) -> int:
        """How many rows of that price fit in."""
        if self.is_full:
            return 0
        time = self.milliseconds - self.spent
        return self.rows if price * self.rows <= time else int(time / price)

    def less(self, rows: int, price: float) -> "_Room":
        """What is left behind so many rows."""
        return self._replace(rows=self.rows - rows, spent=self.spent + rows * price)

    @property
    def is_full(self) -> bool:
        """Whether no further row is to be taken."""
        return self.rows <= 0 or self.spent >= self.milliseconds


class _Price(NamedTuple):
    """Milliseconds of a row of one prompt, and of one that scores its prompt, in the last loop."""

    row: float
    scored: float

    @classmethod
    def of(cls, sequence: Sequence, cost: PassCost) -> "_Price":
        row = cost.prompt_row(sequence.wave.num_complete)
        scores = sequence.request.prompt_logprobs is not None
        return cls(row, row + cost.scored_row * scores)

    def at(self, depth: int, wave: Wave) -> float:
        """Of a row of the wave that has done so many loops."""
        return self.scored if depth + 1 == wave.num_loops else self.row


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
        room = _Room(self.most_rows, milliseconds)
        for sequence in sorted(readers, key=_turn):
            is_first = room.rows == self.most_rows
            price, source = _Price.of(sequence, cost), sequence.num_unread_source
            if source >= room.at(price.row) and not is_first:
                continue  # it is encoded in one piece, in a pass that has room for it or for nothing else
            num_runs, left = self._take(sequence.wave, room.less(source, price.row), price, is_first=is_first)
            taken[sequence] = num_runs
            if num_runs:
                room = left
            if room.is_full:
                break
        total = self.most_rows - room.rows
        self.rows_run += total
        return PromptRows(taken, total, room.spent)

    def _take(self, wave: Wave, room: _Room, price: _Price, *, is_first: bool) -> tuple[int, _Room]:
        """The number of first runs of a wave that fit into `room`, and what they leave of it.

        Of the prompt whose turn it is, something always fits.
        """
        num_runs = 0
        while not room.is_full or (is_first and not num_runs):
            least = is_first and not num_runs
            if num_runs == len(wave.runs):
                fits = max(room.at(price.at(0, wave)), least)
                if not self._enter(wave, fits, least):
                    break
            run = wave.runs[num_runs]
            if run.start >= wave.num_known:
                break  # a draft behind the prompt
            cost = price.at(run.depth, wave)
            fits = max(room.at(cost), least)
            if run.num_rows > fits:
                if not least:
                    break
                if run.num_rows > fits + fits // SLACK and not wave.is_whole(run):
                    wave.split(num_runs, fits)
            num_runs += 1
            room = room.less(run.num_rows, cost)
        return num_runs, room

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
