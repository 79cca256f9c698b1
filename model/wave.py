"""The SPEED state machine of one sequence: which rows are in flight, what a prediction does to them.

Pure Python; knows nothing about tensors, pages or other sequences. Source: SPEED (Hooper et al. 2023,
arXiv 2310.12072). Where guesses come from is the draft policy's affair (`model.drafts`).

A wave is a list of runs in order of position. A run is consecutive positions at one depth: a prompt
chunk, or a decoded token with the tokens that a text match proposes behind it. For R = 4 and draft depth
1, once a prompt of five tokens is read and all drafts hold, the loops finished after each pass are

    position   4  5  6  7  8 ...
    pass 1     1                     the row of position 4 drafts the token of position 5
    pass 2     2  1
    pass 3     3  2  1
    pass 4     4  3  2  1            position 4 confirms token 5; from here one token a pass
    pass 5        4  3  2  1

Invariants: depths never rise along the list, and a run enters the block only behind one that has
already done the same loop, so the K/V that it reads is there; every token up to `num_committed` is
final; a token behind it is a draft. What the last depth says is committed, whatever the drafts were.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from model.drafts import DraftPolicy

Outcome = Literal["open", "complete", "stuck"]


class Constraint(Protocol):
    """What a text must match, as far as a wave has to know."""

    @property
    def problem(self) -> str:
        """Why the last outcome was "stuck"."""

    def outcome(self, tokens: list[int], position: int, token: int) -> Outcome:
        """What follows `token` at `position`, behind tokens[:position]; `token` may be a draft.

        "open": other tokens may; "complete": nothing can, and the text is whole; "stuck": nothing can,
        and it is not.
        """

    def admits(self, tokens: list[int], proposed: list[int]) -> int:
        """How many of the tokens `proposed` may follow `tokens`, with more behind each of them."""


class Unconstrained:
    """Any text; it never ends by itself."""

    problem = ""

    def outcome(self, tokens: list[int], position: int, token: int) -> Outcome:
        """See Constraint."""
        del tokens, position, token
        return "open"

    def admits(self, tokens: list[int], proposed: list[int]) -> int:
        """See Constraint."""
        del tokens
        return len(proposed)


@dataclass(slots=True)
class Run:
    """Positions start .. start + num_rows - 1, each with `depth` loops finished.

    `survival` is how likely the run's rows are to be of use, on average, given that the run before it
    is; 1 for what is certain. `is_probed`: the readouts of its latest pass, short of the last depth, are
    noted to be compared with the last depth, and change nothing else.
    """

    start: int
    num_rows: int
    depth: int = 0
    survival: float = 1.0
    is_probed: bool = False

    @property
    def last(self) -> int:
        """The last position of the run."""
        return self.start + self.num_rows - 1


class Wave:
    """Tokens and rows in flight of one sequence.

    `tokens` is the prompt, what is committed, and the drafts; it grows and shrinks at the end only.
    `length_limit` bounds prompt and output together; `ending_tokens` end the sequence when committed
    (a draft that might end it isn't followed up), and so does a token that the `constraint` says nothing
    can follow.
    """

    def __init__(
        self,
        prompt: list[int],
        num_loops: int,
        policy: DraftPolicy,
        length_limit: int,
        ending_tokens: frozenset[int] = frozenset(),
        *,
        constraint: Constraint | None = None,
    ) -> None:
        self.tokens = list(prompt)
        self.num_loops = num_loops
        self.policy = policy
        self.length_limit = length_limit
        self.ending_tokens = ending_tokens
        self.constraint = constraint or Unconstrained()
        self.prompt_length = len(prompt)
        self.num_known = len(prompt)  # tokens that are read as a prompt: after a restart, outputs as well
        self.num_committed = len(prompt)
        self.finished = False
        self.runs: list[Run] = []
        self.num_entered = 0  # known positions that have a run or had one, or whose K/V was found
        self.accepted_drafts = 0
        self.rejected_drafts = 0
        self.flushed_depth: int | None = None  # the depth that contradicted a draft in the last pass
        self._guesses: dict[int, dict[int, int]] = {}  # position -> depth -> the token it said
        self._trust: dict[int, float] = {}  # of drafts that came from the text, not from a readout

    @property
    def is_reading_prompt(self) -> bool:
        """Whether any known position is still to enter or in flight behind the last one."""
        return self.num_entered < self.num_known or (
            bool(self.runs) and self.runs[0].start < self.num_known - 1
        )

    @property
    def num_complete(self) -> int:
        """Positions, from the first, whose K/V is final at every depth: nothing writes them again."""
        if self.runs:
            return self.runs[0].start
        return self.num_entered if self.num_entered < self.num_known else self.num_committed - 1

    @property
    def certain_end(self) -> int:
        """Positions that need pages before the next pass: all but the drafts'."""
        if not self.is_reading_prompt:
            return self.runs[0].last + 1
        return max((run.last + 1 for run in self.runs if run.start < self.num_known), default=0)

    def skip(self, num_cached: int) -> None:
        """The K/V of the first `num_cached` known positions is there already: they don't enter."""
        self.num_entered = num_cached

    def restart(self) -> None:
        """Forgets all rows: what is committed will be read again like a prompt, and goes on from there."""
        self.rejected_drafts += len(self.tokens) - self.num_committed
        del self.tokens[self.num_committed :]
        self.runs.clear()
        self._guesses.clear()
        self._trust.clear()
        self.num_known = self.num_committed
        self.num_entered = 0

    def enter_prompt(self, max_rows: int) -> None:
        """Appends the next chunk of at most `max_rows` known positions, if any is left.

        One chunk enters at a time: not while the last run hasn't done its first loop.
        """
        count = min(max_rows, self.num_known - self.num_entered)
        if count > 0 and not (self.runs and self.runs[-1].depth == 0):
            self.runs.append(Run(self.num_entered, count))
            self.num_entered += count
            self.policy.committed(self.tokens, self.num_entered)

    def narrow(self) -> None:
        """Takes back what the text proposed behind the last run's first token, if no pass has run it."""
        run = self.runs[-1]
        if run.depth == 0 and run.start >= self.num_known and run.num_rows > 1:
            for position in range(run.start + 1, len(self.tokens)):
                self._trust.pop(position, None)
            del self.tokens[run.start + 1 :]
            run.num_rows = 1

    @property
    def proposal_chance(self) -> float:
        """How likely, on average, the rows behind the first one of the certain run are to be of use.

        1 unless they are a proposal that no pass has run, which `narrow` could take back.
        """
        run = self.runs[0]
        if len(self.runs) > 1 or run.num_rows == 1 or run.depth or run.start < self.num_known:
            return 1.0
        return (run.survival * run.num_rows - 1) / (run.num_rows - 1)

    def num_readouts(self, run: Run) -> int:
        """How many of the run's last rows the pass that it takes part in next can read out.

        Those of the last depth must be, those of a draft depth are if that is worth it.
        """
        rows = run.last - max(run.start, self.num_known - 1) + 1
        if rows <= 0 or self.length_limit == self.prompt_length:
            return 0  # the next token is known, or none is wanted
        if run.depth + 1 == self.num_loops:
            return rows
        useless = run.num_rows == 1 and run.last + 2 >= self.length_limit  # nothing would follow a draft
        return 0 if useless or run.depth + 1 not in self.policy.depths else rows

    def gain(self, run: Run) -> float:
        """By how much a draft readout in the run's next pass raises the chance of a right row behind it.

        A run of several rows is a proposal: wherever it breaks, its readouts start what is right.
        """
        rate = self.policy.agreement.rate(run.depth + 1)
        following = self._run_at(run.last + 1)
        return rate - following.survival if following and run.num_rows == 1 else rate

    def starts_row(self, run: Run) -> bool:
        """Whether a draft readout of the run would start a row, not just check the one that is there."""
        return run.last + 1 >= len(self.tokens)

    def update(self, runs: list[Run], predictions: Mapping[int, int]) -> list[int]:
        """Takes in a pass in which `runs`, the first ones of the wave, did one loop.

        `predictions` maps the position of every readout, those of the last depth among them, to the token
        predicted for the position behind it. Returns the tokens committed, oldest first; after an
        ending token or at the length limit the wave is `finished` and has no runs left.
        """
        self.flushed_depth = None
        committed: list[int] = []
        for run in runs:
            run.depth += 1
        for run in runs:
            if not self._take_in(run, predictions, committed):
                break  # whatever stood behind is gone
        self.runs = [run for run in self.runs if run.depth < self.num_loops]
        if not self.runs and self.length_limit == self.num_entered:
            self.finished = True  # a prompt to read and nothing to say
        if self.finished:
            self.runs.clear()
        if committed:
            self.policy.committed(self.tokens, self.num_committed)
        return committed

    def _take_in(self, run: Run, predictions: Mapping[int, int], committed: list[int]) -> bool:
        """Takes in the readouts of one run; False when one contradicted, or was the first of its position."""
        for position in range(run.start, run.last + 1):
            token = predictions.get(position)
            if token is None:
                continue
            if run.depth == self.num_loops:
                holds = self._commit(run, position + 1, token, committed)
            else:
                self._guesses.setdefault(position + 1, {})[run.depth] = token
                holds = run.is_probed or self._compare(run, position + 1, token)
            if not holds:
                return False
        return True

    def _commit(self, run: Run, position: int, token: int, committed: list[int]) -> bool:
        """The last depth says `token` at `position`."""
        agrees = position < len(self.tokens) and self.tokens[position] == token
        self.policy.observe(self._guesses.pop(position, {}), token)
        self._trust.pop(position, None)
        if not agrees:
            self._flush(position, run)
        self.accepted_drafts += agrees
        self.num_committed = position + 1
        committed.append(token)
        self.finished = self._ends(position, token)
        if not agrees:
            self._append(position, token, survival=1.0)
        elif following := self._run_at(position):
            following.survival = 1.0
        return agrees and not self.finished

    def _compare(self, run: Run, position: int, token: int) -> bool:
        """An earlier depth says `token` at `position`."""
        rate = self.policy.agreement.rate(run.depth)
        if position >= len(self.tokens):
            better, trust = self.policy.prefer(self.tokens, token, run.depth)
            if better != token and not self.constraint.admits(self.tokens, [better]):
                better, trust = token, rate
            if better != token:
                self._trust[position] = trust
            self._append(position, better, trust)
            return False
        if self.tokens[position] == token:
            self._believe(position, rate)
            return True
        if position in self._trust and not self.policy.overrules(run.depth, self._trust[position]):
            return True
        self._flush(position, run)
        self._append(position, token, rate)
        return False

    def _believe(self, position: int, rate: float) -> None:
        """A readout that is right with `rate` agrees with the draft at `position`."""
        if position in self._trust:
            self._trust[position] = max(self._trust[position], rate)
        if following := self._run_at(position):
            following.survival = max(following.survival, rate)

    def _append(self, position: int, token: int, survival: float) -> None:
        """A new last token; its row enters, with what the policy proposes behind it, if it may go on."""
        self.tokens.append(token)
        if self.finished or self._ends(position, token):
            return
        proposed = self._proposal()
        rate = self.policy.proposal_rate() if proposed else 0.0
        chance, total = survival, survival
        for _ in proposed:
            chance *= rate
            total += chance
        self._trust.update(dict.fromkeys(range(position + 1, position + 1 + len(proposed)), rate))
        self.tokens.extend(proposed)
        self.runs.append(Run(position, 1 + len(proposed), survival=total / (1 + len(proposed))))

    def _proposal(self) -> list[int]:
        """What the policy proposes behind the last token, up to what might end the sequence."""
        room = max(0, self.length_limit - 1 - len(self.tokens))
        proposed = self.policy.propose(self.tokens)[:room]
        ends = (index for index, token in enumerate(proposed) if token in self.ending_tokens)
        proposed = proposed[: next(ends, len(proposed))]
        return proposed[: self.constraint.admits(self.tokens, proposed)]

    def _flush(self, position: int, run: Run) -> None:
        """Drops tokens and rows from `position` on: nothing is copied, the end moves back."""
        if position >= len(self.tokens):
            return
        self.flushed_depth = run.depth
        self.rejected_drafts += len(self.tokens) - position
        for dropped in range(position, len(self.tokens)):
            self._guesses.pop(dropped + 1, None)
            self._trust.pop(dropped, None)
        del self.tokens[position:]
        while self.runs and self.runs[-1].start >= position:
            self.runs.pop()
        if run.last >= position:
            run.num_rows = position - run.start

    def _run_at(self, position: int) -> Run | None:
        """The run that starts at `position`, if any does."""
        return next((run for run in self.runs if run.start == position), None)

    def _ends(self, position: int, token: int) -> bool:
        """Whether `token` at `position` is, or if confirmed would be, the last of the sequence."""
        if token in self.ending_tokens or position + 1 >= self.length_limit:
            return True
        return self.constraint.outcome(self.tokens, position, token) != "open"
