"""What a pass costs, and so how many speculative rows are worth running. Pure Python.

A row that may be of no use is worth its time while it brings more useful rows per millisecond than the
pass does without it: then tokens/s rise. While a pass is memory-bound a further row costs nearly
nothing and every guess is worth trying; under load only the likely ones are, and waves narrow.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, Protocol

LIKELY_AGREEMENT, LIKELY_CONTEXT = 0.9, 256.0  # of a good draft, and tokens of a common request
MARGIN = 1.2  # rows that barely pay are left: prices are measured, and agreement estimated, with errors


class PassPrice(NamedTuple):
    """Milliseconds of a pass of certain rows, one a sequence, and of each row beyond.

    `base` is that of a pass without readouts; the first readout costs `head` (its weights are read, its
    operators called), and any readout `draw` more if its token is sampled.
    """

    base: float
    row: float
    draw: float = 0.0
    head: float = 0.0


class PromptPrice(NamedTuple):
    """Milliseconds of a prompt's row in a chunk of many; `token` more for each token before it.

    `score` more in the last loop, where the prompt's tokens are scored: that takes the head for every row.
    """

    row: float
    token: float = 0.0
    score: float = 0.0


class ReadoutPrice(NamedTuple):
    """Milliseconds: `head` of a pass's first readout, and what it and any readout cost more if sampled."""

    head: float = 0.0
    drawn_head: float = 0.0
    draw: float = 0.0


FREE = ReadoutPrice()


class PassCost(Protocol):
    """Decides on speculative rows, and on the rows of prompts beside sequences that decode."""

    def price(self, num_sequences: int, context: float, drawn: float = 0.0) -> PassPrice:
        """Price of a pass over `num_sequences` with `context` tokens each; a share `drawn` of them sample."""

    def prompt_row(self, context: float) -> float:
        """Milliseconds of a prompt's row behind `context` tokens, read in a chunk with others."""

    @property
    def scored_row(self) -> float:
        """Milliseconds more of a prompt's row that scores the token behind it."""

    @property
    def most_rows(self) -> int:
        """Rows beyond which a pass takes no speculative ones."""


class Outlay:
    """What a pass costs and brings, as rows are added to it."""

    def __init__(self, price: PassPrice, num_sequences: int, rows: int, has_readout: bool = True) -> None:
        """A pass of `rows` certain rows of `num_sequences` sequences; `has_readout` if any must be made."""
        self.rows = rows
        self.head = 0.0 if has_readout else price.head  # milliseconds of the first readout beyond those
        self._row_price, self._draw_price = price.row, price.draw
        self._milliseconds = price.base + price.row * max(0, rows - num_sequences) + price.head - self.head
        self._useful = float(rows)

    @property
    def milliseconds(self) -> float:
        """What the pass takes."""
        return self._milliseconds

    @property
    def least_agreement(self) -> float:
        """The agreement from which on a further row raises the useful rows per millisecond."""
        return MARGIN * self._useful * self._row_price / self._milliseconds

    def least_agreement_of_readout(self, loops_ahead: int) -> float:
        """The agreement from which on a draft that starts a row so many loops early pays."""
        price = self._row_price + self._draw_price / loops_ahead
        return MARGIN * self._useful * price / self._milliseconds

    def saved_by_readout(self, added_agreement: float, loops_ahead: int, starts_row: bool) -> float:
        """Milliseconds that a draft readout saves, less its own price but for the head's.

        It starts a row so many loops early, whose agreement it raises by `added_agreement`.
        """
        price = self._draw_price + self._row_price * loops_ahead * starts_row
        return added_agreement * loops_ahead * self._milliseconds / (MARGIN * self._useful) - price

    def add(self, rows: int, agreement: float) -> None:
        """Takes in speculative rows, each of which is of use with probability `agreement`."""
        self.rows += rows
        self._useful += agreement * rows
        self._milliseconds += self._row_price * rows

    def add_prompts(self, rows: int, milliseconds: float) -> None:
        """Takes in rows of prompts, which take so long together."""
        self.rows += rows
        self._useful += rows
        self._milliseconds += milliseconds


class FixedBudget:
    """`--row-budget N`: speculative rows are free up to N rows a pass, and none are taken beyond.

    N rows of a prompt take as long as the pass that they join.
    """

    scored_row = 0.0

    def __init__(self, most_rows: int) -> None:
        self.most_rows = most_rows

    def price(self, num_sequences: int, context: float, drawn: float = 0.0) -> PassPrice:
        """The price of a pass over so many sequences with `context` tokens each."""
        del num_sequences, context, drawn
        return PassPrice(1.0, 0.0)

    def prompt_row(self, context: float) -> float:
        """Milliseconds of a prompt's row behind `context` tokens."""
        del context
        return 1.0 / self.most_rows


class MeasuredCost:
    """Interpolates prices measured over a grid of sequences x context.

    `prices[i][j]` belongs to num_sequences[i] and contexts[j]; both ascend. Outside the grid a further
    sequence costs what a row does (within 20 % from 16 to 32 sequences), and the price of a row stays.
    """

    def __init__(
        self,
        num_sequences: Sequence[int],
        contexts: Sequence[int],
        prices: Sequence[Sequence[PassPrice]],
        most_rows: int,
        *,
        readout: ReadoutPrice = FREE,
        prompt: PromptPrice | None = None,
    ) -> None:
        """Without a price of their own, a prompt's rows cost what the others do."""
        self.num_sequences, self.contexts, self.prices = num_sequences, contexts, prices
        self.readout = readout
        self.prompt = prompt
        self.most_rows = most_rows

    def price(self, num_sequences: int, context: float, drawn: float = 0.0) -> PassPrice:
        """The price of a pass over so many sequences with `context` tokens each."""
        j, right = _place(self.contexts, context)
        price = self._over_sequences(num_sequences, j)
        if right:
            price = _between(price, self._over_sequences(num_sequences, j + 1), right)
        head = self.readout.head + self.readout.drawn_head * (drawn > 0)
        return PassPrice(price.base, price.row, self.readout.draw * drawn, head)

    def prompt_row(self, context: float) -> float:
        """Milliseconds of a prompt's row behind `context` tokens."""
        if self.prompt is None:
            return self.price(1, context).row
        return self.prompt.row + self.prompt.token * context

    @property
    def scored_row(self) -> float:
        """Milliseconds more of a prompt's row that scores the token behind it."""
        return 0.0 if self.prompt is None else self.prompt.score

    def _over_sequences(self, num_sequences: int, j: int) -> PassPrice:
        i, right = _place(self.num_sequences, num_sequences)
        here = self.prices[i][j]
        if right:
            return _between(here, self.prices[i + 1][j], right)
        beyond = max(0, num_sequences - self.num_sequences[i])
        return here._replace(base=here.base + here.row * beyond)


def speculates_alone(cost: PassCost) -> bool:
    """Whether a request that is alone gets speculative rows for its likeliest drafts."""
    single = Outlay(cost.price(1, LIKELY_CONTEXT), 1, 1)
    return cost.most_rows > 1 and single.least_agreement <= LIKELY_AGREEMENT


def _between(here: PassPrice, there: PassPrice, right: float) -> PassPrice:
    """The price `right`, 0..1, of the way from one to the other, but for readouts."""
    return PassPrice(here.base + (there.base - here.base) * right, here.row + (there.row - here.row) * right)


def _place(grid: Sequence[int], value: float) -> tuple[int, float]:
    """Index of the grid point at or before `value`, and how far towards the next one it lies, 0..1."""
    index = max(0, bisect_right(grid, value) - 1)
    if index + 1 == len(grid) or value <= grid[0]:
        return index, 0.0
    return index, (value - grid[index]) / (grid[index + 1] - grid[index])
