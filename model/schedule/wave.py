"""The SPEED state machine of one sequence: which rows are in flight, what a prediction does to them.

Pure Python; knows nothing about tensors, pages or other sequences. Source: SPEED (Hooper et al. 2023,
arXiv 2310.12072). Where guesses come from is the draft policy's affair (`model.schedule.drafts`).

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

With an exit threshold (Ouro, arXiv 2510.25741) nothing is drafted: a token is what the first depth says at
which the gate has stopped with that probability. Its row runs on to the last depth all the same, for the K/V
of the rows behind it, and is not read out again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from model.protocol import FinishReason
from model.schedule.drafts import DraftPolicy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Outcome = Literal["open", "complete", "stuck"]
NO_GATES: Mapping[int, float] = MappingProxyType({})


class Constraint(Protocol):
    """What a text must match, as far as a wave has to know."""

    @property
    def problem(self) -> str:
        """Why the outcome of the last certain token was "stuck"."""

    def outcome(self, tokens: list[int], position: int, token: int, *, is_certain: bool) -> Outcome:
        """What follows `token` at `position`, behind tokens[:position]; a draft unless `is_certain`.

        "open": other tokens may; "complete": nothing can, and the text is whole; "stuck": nothing can,
        and it is not. A draft may be called "stuck" that is "open" once it is certain.
        """

    def forbidden(
        self, wave: "Wave", position: int, *, before_min_tokens: bool
    ) -> "NDArray[np.bool_] | None":
        """Tokens that must not stand at `position`, (vocab,), read only; None if nothing is forbidden.

        Before `min_tokens` the ending tokens are forbidden too, as long as that leaves any.
        """

    def admits(self, tokens: list[int], proposed: list[int]) -> int:
        """How many of the tokens `proposed` may follow `tokens`, with more behind each of them."""


class Unconstrained:
    """Any text; it never ends by itself."""

    problem = ""

    def outcome(self, tokens: list[int], position: int, token: int, *, is_certain: bool) -> Outcome:
        """Always "open": other tokens may follow any token."""
        del tokens, position, token, is_certain
        return "open"

    def forbidden(
        self, wave: "Wave", position: int, *, before_min_tokens: bool
    ) -> "NDArray[np.bool_] | None":
        """Always None: no token is forbidden."""
        del wave, position, before_min_tokens
        return None

    def admits(self, tokens: list[int], proposed: list[int]) -> int:
        """All that are proposed."""
        del tokens
        return len(proposed)


class Ending(NamedTuple):
    """Why a sequence is over; `stop_token_id` if a token ended it, `problem` if an error did.

    `is_refusal`: the error is the request's own, and its sender is told the problem.
    """

    reason: FinishReason
    stop_token_id: int | None = None
    problem: str | None = None
    is_refusal: bool = False


@dataclass(slots=True)
class Draft:
    """A token that no last depth has confirmed.

    `agreement` is the probability that the last depth will say the same, given that all tokens before it
    hold. `is_from_text` marks a token that an earlier place of the text proposed, not a readout.
    """

    token: int
    agreement: float
    is_from_text: bool = False


@dataclass(slots=True)
class Run:
    """Positions start .. start + num_rows - 1, each with `depth` loops finished.

    `is_probed`: the readouts of its latest pass, short of the last depth, are noted to be compared with
    the last depth, and change nothing else. `num_read`: so many of its last rows are read out in that pass.
    `guesses` maps a position to what the readouts of its row said at each depth so far; it goes when the
    row goes. `going_on` is the probability that the exit gate has stopped the last row at no depth so far.
    """

    start: int
    num_rows: int
    depth: int = 0
    is_probed: bool = False
    num_read: int = 0
    guesses: dict[int, dict[int, int]] = field(default_factory=dict)
    going_on: float = 1.0

    @property
    def last(self) -> int:
        """The last position of the run."""
        return self.start + self.num_rows - 1

    def cut(self, position: int) -> None:
        """Drops the rows from `position` on, which lies inside the run."""
        self.num_rows = position - self.start
        self.guesses = {row: said for row, said in self.guesses.items() if row < position}


class Wave:
    """Tokens and rows in flight of one sequence.

    `tokens` is the prompt, what is committed, and the drafts; it grows and shrinks at the end only. `drafts`
    says how far each token behind `num_committed` is believed; the two lists end together. `ending` is why
    the sequence is over, None while it goes on.

    `length_limit` bounds prompt and output together; `ending_tokens` end the sequence when committed (a
    draft that might end it isn't followed up), and so does a token that the `constraint` says nothing can
    follow. The first `prefix` tokens, none or the prompt, see one another both ways: they are read in one
    piece, and so are again after a restart. With `ends_alone` the last known token enters when those before
    it have done all their loops, so that whatever is read out of it has seen what is final.
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
        prefix: int = 0,
        exit_threshold: float | None = None,
        ends_alone: bool = False,
    ) -> None:
        self.tokens = list(prompt)
        self.num_loops = num_loops
        self.policy = policy
        self.length_limit = length_limit
        self.ending_tokens = ending_tokens
        self.constraint = constraint or Unconstrained()
        self.prompt_length = len(prompt)
        self.prefix = prefix
        self.exit_threshold = exit_threshold
        # The first depth whose readout can make a token final.
        self.first_committing_depth = num_loops if exit_threshold is None else 1
        self.ends_alone = ends_alone
        self.num_known = len(prompt)  # tokens that are read as a prompt: after a restart, outputs as well
        self.num_committed = len(prompt)
        self.ending: Ending | None = None
        self.drafts: list[Draft] = []
        self.runs: list[Run] = []
        self.num_entered = 0  # known positions that have a run or had one, or whose K/V was found
        self.accepted_drafts = 0
        self.rejected_drafts = 0
        self.flushed_depth: int | None = None  # the depth that contradicted a draft in the last pass

    @property
    def finished(self) -> bool:
        """Whether the sequence is over."""
        return self.ending is not None

    @property
    def is_reading_prompt(self) -> bool:
        """Whether any known position is still to enter or in flight behind the last one."""
        return self.num_entered < self.num_known or (
            bool(self.runs) and self.runs[0].start < self.num_known - 1
        )

    @property
    def num_rows_to_read(self) -> int:
        """Rows of known positions that are left to run, over all loops."""
        in_flight = sum(
            run.num_rows * (self.num_loops - run.depth) for run in self.runs if run.start < self.num_known
        )
        return in_flight + (self.num_known - self.num_entered) * self.num_loops

    @property
    def num_complete(self) -> int:
        """Positions, from the first, whose K/V is final at every depth: nothing writes them again."""
        if self.runs:
            return self.runs[0].start
        return self.num_entered if self.num_entered < self.num_known else self.num_committed - 1

    @property
    def certain_end(self) -> int:
        """Positions of a wave that decodes that need pages before the next pass: all but the drafts'."""
        return self.runs[0].last + 1

    def skip(self, num_cached: int) -> None:
        """The K/V of the first `num_cached` known positions is there already: they don't enter."""
        self.num_entered = num_cached

    def restart(self) -> None:
        """Forgets all rows: what is committed will be read again like a prompt, and goes on from there."""
        self.rejected_drafts += len(self.drafts)
        self._truncate(self.num_committed)
        self.runs.clear()
        self.num_known = self.num_committed
        self.num_entered = 0

    @property
    def reads_whole(self) -> bool:
        """Whether what enters next is all that is left of a prefix, however long it is."""
        return self.num_entered < self.prefix

    def next_chunk(self, max_rows: int) -> int:
        """Known positions that enter together next: at most `max_rows`, but all that are left of a prefix."""
        if self.reads_whole:
            return self.prefix - self.num_entered
        left = self.num_known - self.num_entered
        if self.ends_alone and left > 1:
            left -= 1
        elif self.ends_alone and self.runs:
            return 0
        return min(max_rows, left)

    def is_whole(self, run: Run) -> bool:
        """Whether the run is part of a prefix, and so can't be cut."""
        return run.start < self.prefix

    def enter_prompt(self, max_rows: int) -> None:
        """Appends the next chunk of known positions, as `next_chunk` cuts it, if any is left.

        One chunk enters at a time: not while the last run hasn't done its first loop.
        """
        count = self.next_chunk(max_rows)
        if count > 0 and not (self.runs and self.runs[-1].depth == 0):
            self.runs.append(Run(self.num_entered, count))
            self.num_entered += count
            self.policy.committed(self.tokens, self.num_entered)

    def split(self, index: int, num_rows: int) -> None:
        """Cuts a run of known positions behind its first `num_rows` rows, which can go ahead alone."""
        run, end = self.runs[index], self.runs[index].start + num_rows
        said = {row: guesses for row, guesses in run.guesses.items() if row >= end}
        rest = Run(end, run.num_rows - num_rows, run.depth, guesses=said, going_on=run.going_on)
        self.runs.insert(index + 1, rest)
        run.cut(end)

    def narrow(self) -> None:
        """Takes back what the text proposed behind the last run's first token, if no pass has run it."""
        run = self.runs[-1]
        if run.depth == 0 and run.start >= self.num_known and run.num_rows > 1:
            self._truncate(run.start + 1)
            run.num_rows = 1

    def agreement(self, run: Run) -> float:
        """The probability that a row of the run is of use, on average over the run.

        It counts from the run before it: a row is of use if its own token and those before it in the run
        hold. 1 for a run of certain tokens.
        """
        num_certain = min(run.num_rows, max(0, self.num_committed - run.start))
        first = run.start + num_certain - self.num_committed
        holds, total = 1.0, float(num_certain)
        for draft in self.drafts[first : first + run.num_rows - num_certain]:
            holds *= draft.agreement
            total += holds
        return total / run.num_rows

    @property
    def proposal_agreement(self) -> float:
        """The agreement of the rows behind the first one of the certain run.

        1 unless they are a proposal that no pass has run, which `narrow` could take back.
        """
        run = self.runs[0]
        if len(self.runs) > 1 or run.num_rows == 1 or run.depth or run.start < self.num_known:
            return 1.0
        return (self.agreement(run) * run.num_rows - 1) / (run.num_rows - 1)

    def num_readouts(self, run: Run) -> int:
        """How many of the run's last rows the pass that it takes part in next can read out.

        Those that may commit must be, those of a draft depth are if that is worth it.
        """
        end = run.start + run.num_rows
        rows = min(run.num_rows, end - self.num_committed + 1)
        if rows <= 0 or self.length_limit == self.prompt_length:
            return 0  # the next token is known, or none is wanted
        if run.depth + 1 >= self.first_committing_depth:
            return rows
        useless = run.num_rows == 1 and end + 1 >= self.length_limit  # nothing would follow a draft
        return 0 if useless or run.depth + 1 not in self.policy.depths else rows

    def added_agreement(self, run: Run) -> float:
        """By how much a draft readout in the run's next pass raises the agreement of the row behind it.

        A run of several rows is a proposal: wherever it breaks, its readouts start what is right.
        """
        agreement = self.policy.agreement.of(run.depth + 1)
        following = self._run_at(run.last + 1)
        return agreement - self.agreement(following) if following and run.num_rows == 1 else agreement

    def starts_row(self, run: Run) -> bool:
        """Whether a draft readout of the run would start a row, not just check the one that is there."""
        return run.last + 1 >= len(self.tokens)

    def read_out(self, run: Run, num_rows: int, is_probe: bool = False) -> None:
        """The run's next pass reads out its last `num_rows` rows; what a probe says changes nothing."""
        run.num_read, run.is_probed = num_rows, is_probe

    def update(
        self, runs: list[Run], predictions: Mapping[int, int], gates: Mapping[int, float] = NO_GATES
    ) -> list[int]:
        """Takes in a pass in which `runs`, the first ones of the wave, did one loop.

        `predictions` maps the position of every readout, those of the last depth among them, to the token
        predicted for the position behind it; `gates` the same positions to the probability by which the
        exit gate stops there. Returns the tokens committed, oldest first; after an ending token or at the
        length limit the wave is `finished` and has no runs left.
        """
        self.flushed_depth = None
        committed: list[int] = []
        for run in runs:
            run.depth += 1
        for run in runs:
            if not self._take_in(run, predictions, gates, committed):
                break  # whatever stood behind is gone
        for run in runs:
            run.num_read, run.is_probed = 0, False
        self.runs = [run for run in self.runs if run.depth < self.num_loops]
        if not self.runs and self.length_limit == self.num_entered:
            self.ending = Ending("length")  # a prompt to read and nothing to say
        if self.finished:
            self.runs.clear()
        if committed:
            self.policy.committed(self.tokens, self.num_committed)
        return committed

    def _take_in(
        self, run: Run, predictions: Mapping[int, int], gates: Mapping[int, float], committed: list[int]
    ) -> bool:
        """Takes in the readouts of one run; False when one contradicted, or was the first of its position."""
        for position in range(run.start, run.start + run.num_rows):
            token = predictions.get(position)
            if token is None:
                continue
            if run.depth >= self.first_committing_depth:
                # Where the gate lets it go on, a deeper loop will say the token: nothing is guessed.
                is_said = run.depth == self.num_loops or self._exits(run, gates[position])
                holds = is_said and self._commit(run, position + 1, token, committed)
            else:
                run.guesses.setdefault(position, {})[run.depth] = token
                holds = run.is_probed or self._compare(run, position + 1, token)
            if not holds:
                return False
        return True

    def _exits(self, run: Run, gate: float) -> bool:
        """Whether the gate has stopped the last row of the run by now, with the probability that is asked."""
        assert self.exit_threshold is not None
        run.going_on *= 1.0 - gate
        return 1.0 - run.going_on >= self.exit_threshold

    def _commit(self, run: Run, position: int, token: int, committed: list[int]) -> bool:
        """The last depth says `token` at `position`."""
        agrees = bool(self.drafts) and self.drafts[0].token == token
        self.policy.observe(run.guesses.pop(position - 1, {}), token)
        if agrees:
            del self.drafts[0]
        else:
            self._flush(position, run)
            self.tokens.append(token)
        self.accepted_drafts += agrees
        self.num_committed = position + 1
        committed.append(token)
        self.ending = self._ending(position, token)
        if self.ending is None and self.runs[-1].last < position:
            self._follow_up(position)  # it is new, or was a draft that looked like the end
        return agrees and self.ending is None

    def _compare(self, run: Run, position: int, token: int) -> bool:
        """An earlier depth says `token` at `position`."""
        if position >= len(self.tokens):
            better, believed = self.policy.prefer(self.tokens, token, run.depth)
            if better != token and not self.constraint.admits(self.tokens, [better]):
                better, believed = token, self.policy.agreement.of(run.depth)
            self._append(position, Draft(better, believed, is_from_text=better != token))
            return False
        draft = self.drafts[position - self.num_committed]
        agreement = self.policy.agreement.of(run.depth)
        if draft.token == token:
            draft.agreement = max(draft.agreement, agreement)
            return True
        if draft.is_from_text and not self.policy.overrules(run.depth, draft.agreement):
            return True
        self._flush(position, run)
        self._append(position, Draft(token, agreement))
        return False

    def _append(self, position: int, draft: Draft) -> None:
        """A new last token; its row enters, with what the policy proposes behind it, if it may go on."""
        self.tokens.append(draft.token)
        self.drafts.append(draft)
        if self._ending(position, draft.token) is None:
            self._follow_up(position)

    def _follow_up(self, position: int) -> None:
        """Starts the row of the last token, at `position`, with what the policy proposes behind it."""
        proposed = self._proposal()
        agreement = self.policy.proposal_agreement() if proposed else 0.0
        self.tokens.extend(proposed)
        self.drafts.extend(Draft(token, agreement, is_from_text=True) for token in proposed)
        self.runs.append(Run(position, 1 + len(proposed)))

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
        self._truncate(position)
        while self.runs and self.runs[-1].start >= position:
            self.runs.pop()
        if run.last >= position:
            run.cut(position)

    def _truncate(self, position: int) -> None:
        """Drops the tokens from `position` on, all of them drafts."""
        del self.tokens[position:]
        del self.drafts[position - self.num_committed :]

    def _run_at(self, position: int) -> Run | None:
        """The run that starts at `position`, if any does."""
        return next((run for run in self.runs if run.start == position), None)

    def _ending(self, position: int, token: int) -> Ending | None:
        """Why `token` at `position` is the last one, or would be if it were confirmed; None if it isn't."""
        if token in self.ending_tokens:
            return Ending("stop", stop_token_id=token)
        is_certain, is_long = position < self.num_committed, position + 1 >= self.length_limit
        if is_long and not is_certain:
            return Ending("length")
        outcome = self.constraint.outcome(self.tokens, position, token, is_certain=is_certain)
        if outcome == "stuck":
            return Ending("error", problem=self.constraint.problem, is_refusal=True)
        if outcome == "complete":
            return Ending("stop")
        return Ending("length") if is_long else None
