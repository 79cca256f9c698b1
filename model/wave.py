"""The SPEED state machine of one sequence: which rows are in flight, what a prediction does to them.

Pure Python; knows nothing about tensors, pages or other sequences. Source: SPEED (Hooper et al. 2023,
arXiv 2310.12072), with the re-check of every later draft depth.

A wave is a list of runs in order of position. A run is consecutive positions at one depth: a prompt
chunk, or the one position of a decoded token. For R = 4 and draft depth 1, once a prompt of five
tokens is read and all drafts hold, the loops finished after each pass are

    position   4  5  6  7  8 ...
    pass 1     1                     the row of position 4 drafts the token of position 5
    pass 2     2  1
    pass 3     3  2  1
    pass 4     4  3  2  1            position 4 confirms token 5; from here one token a pass
    pass 5        4  3  2  1

Invariants: depths never rise along the list, and a run enters the block only behind one that has
already done the same loop, so the K/V that it reads is there; every token up to `num_committed` is
final; a token behind it is a draft that some row predicted.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Run:
    """Positions start .. start + num_rows - 1, each with `depth` loops finished."""

    start: int
    num_rows: int
    depth: int = 0

    @property
    def last(self) -> int:
        """The last position of the run; the only one whose readout may be wanted."""
        return self.start + self.num_rows - 1


class Wave:
    """Tokens and rows in flight of one sequence.

    `tokens` is the prompt, what is committed, and the drafts; it grows and shrinks at the end only.
    `length_limit` bounds prompt and output together; `ending_tokens` end the sequence when committed
    (a draft that might end it isn't followed up).
    """

    def __init__(
        self,
        prompt: list[int],
        num_loops: int,
        draft_depths: tuple[int, ...],
        length_limit: int,
        ending_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self.tokens = list(prompt)
        self.num_loops = num_loops
        self.draft_depths = frozenset(d for d in draft_depths if d < num_loops)
        self.length_limit = length_limit
        self.ending_tokens = ending_tokens
        self.prompt_length = len(prompt)
        self.num_committed = len(prompt)
        self.finished = False
        self.runs: list[Run] = []
        self.num_entered = 0  # prompt positions that have a run or had one
        self.accepted_drafts = 0
        self.rejected_drafts = 0

    @property
    def is_reading_prompt(self) -> bool:
        """Whether any prompt position is still to enter or in flight behind the last one."""
        return self.num_entered < self.prompt_length or (
            bool(self.runs) and self.runs[0].start < self.prompt_length - 1
        )

    def enter_prompt(self, max_rows: int) -> None:
        """Appends the next prompt chunk of at most `max_rows` positions, if any is left.

        One chunk enters at a time: not while the last run hasn't done its first loop.
        """
        count = min(max_rows, self.prompt_length - self.num_entered)
        if count > 0 and not (self.runs and self.runs[-1].depth == 0):
            self.runs.append(Run(self.num_entered, count))
            self.num_entered += count

    def wants_readout(self, run: Run) -> bool:
        """Whether the pass that `run` takes part in next must read its last position out."""
        depth = run.depth + 1
        if run.last < self.prompt_length - 1 or self.length_limit == self.prompt_length:
            return False  # the next token is part of the prompt, or none is wanted
        if depth == self.num_loops:
            return True
        return depth in self.draft_depths and run.last + 2 < self.length_limit

    def update(self, runs: list[Run], predictions: Mapping[int, int]) -> list[int]:
        """Takes in a pass in which `runs`, the first ones of the wave, did one loop.

        `predictions` maps the position of every readout that `wants_readout` asked for to the token
        predicted for the position behind it. Returns the tokens committed, oldest first; after an
        ending token or at the length limit the wave is `finished` and has no runs left.
        """
        for run in runs:
            run.depth += 1
        committed: list[int] = []
        for run in runs:
            if run.last in predictions and not self._holds(run, predictions[run.last], committed):
                break  # whatever stood behind this run is gone
        self.runs = [run for run in self.runs if run.depth < self.num_loops]
        if not self.runs and self.length_limit == self.num_entered:
            self.finished = True  # a prompt to read and nothing to say
        if self.finished:
            self.runs.clear()
        return committed

    def _holds(self, run: Run, token: int, committed: list[int]) -> bool:
        """Takes in one prediction; False when it contradicted, or was the first for, its position."""
        position = run.last + 1
        drafted = position < len(self.tokens)
        agrees = drafted and self.tokens[position] == token
        if drafted and not agrees:
            self._flush(position)
        if run.depth == self.num_loops:
            self.accepted_drafts += agrees
            self.num_committed = position + 1
            committed.append(token)
            self.finished = self._ends(position, token)
        if not agrees:
            self.tokens.append(token)
            if not self.finished and not self._ends(position, token):
                self.runs.append(Run(position, 1))
        return agrees

    def _flush(self, position: int) -> None:
        """Drops the tokens and runs from `position` on: nothing is copied, the end moves back."""
        self.rejected_drafts += len(self.tokens) - position
        del self.tokens[position:]
        while self.runs and self.runs[-1].start >= position:
            self.runs.pop()

    def _ends(self, position: int, token: int) -> bool:
        """Whether `token` at `position` is, or if confirmed would be, the last of the sequence."""
        return token in self.ending_tokens or position + 1 >= self.length_limit
