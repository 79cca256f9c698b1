"""What the wave of one request did, pass by pass, for a client that wants to see it. Pure Python.

Invariants: the recorder changes nothing of the wave that it watches; what it keeps until it is taken is
bounded, however long a prompt is and however wide a wave.
"""

from collections import deque
from collections.abc import Mapping

from model.protocol import MOST_WAVE_PASSES, WavePass, WaveRecord, WaveToken
from model.schedule.wave import NO_GATES, Run, Wave

MOST_ENTRIES = 64  # of each list of a pass; waves as they are have a few


class WaveRecorder:
    """Stands before a wave, and notes what each pass does to it."""

    def __init__(self, wave: Wave) -> None:
        self._wave = wave
        self._passes: deque[WavePass] = deque(maxlen=MOST_WAVE_PASSES)
        self._num_untaken = 0
        # By position of a token that is not committed: what the loops of its row said, by depth.
        self._said: dict[int, dict[int, int]] = {}

    def update(
        self, runs: list[Run], predictions: Mapping[int, int], gates: Mapping[int, float] = NO_GATES
    ) -> list[int]:
        """Takes a pass into the wave, and notes what that did; returns the tokens committed, oldest first."""
        wave = self._wave
        position, drafts = wave.num_committed, wave.tokens[wave.num_committed :]
        ran = [(run.start, run.num_rows, run.depth + 1) for run in runs]  # a flush cuts runs
        for run in ran:
            self._note_said(*run, predictions)
        committed = wave.update(runs, predictions, gates)
        tokens = [self._token(position + index, token) for index, token in enumerate(committed)]
        self._passes.append(
            WavePass(
                runs=ran[:MOST_ENTRIES],
                position=position,
                committed=tokens,
                drafts=wave.tokens[wave.num_committed :][:MOST_ENTRIES],
                flushed=self._flushed(position, drafts),
            )
        )
        self._num_untaken += 1
        return committed

    def take(self) -> WaveRecord:
        """The passes since the last call, the latest ones if there were too many."""
        record = WaveRecord(
            num_loops=self._wave.num_loops,
            passes=list(self._passes),
            omitted=self._num_untaken - len(self._passes),
        )
        self._passes.clear()
        self._num_untaken = 0
        return record

    def _note_said(self, start: int, num_rows: int, depth: int, predictions: Mapping[int, int]) -> None:
        """Notes what the rows of a run say of the tokens behind theirs."""
        for row in range(start, start + num_rows):
            if depth == 1:  # it entered again, behind another token
                self._said.pop(row + 1, None)
            if row in predictions:
                self._said.setdefault(row + 1, {})[depth] = predictions[row]

    def _token(self, position: int, token: int) -> WaveToken:
        """A committed token; of too many guesses the deepest, the last depth's among them."""
        return WaveToken(token, list(self._said.pop(position).items())[-MOST_ENTRIES:])

    def _flushed(self, position: int, drafts: list[int]) -> tuple[int, int] | None:
        """Where the wave has another token than the draft that was there before the pass."""
        depth = self._wave.flushed_depth
        if depth is None:
            return None
        now = self._wave.tokens[position:]
        return position + next(i for i, token in enumerate(drafts) if now[i] != token), depth
