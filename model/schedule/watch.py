"""Whether the passes of a running engine take what they are priced at. Pure Python.

The prices of passes decide on speculation, and they may have been measured while something else had the
cores, or on a machine that has changed since. Invariant: a watch only doubts; prices change by a new
measurement alone.
"""

from statistics import median
from typing import Protocol

PASSES = 64  # that are judged together: one that was interrupted says nothing
DOUBT = 1.6  # times dearer or cheaper than priced, in the middle of those passes


class PriceKeeper(Protocol):
    """Owns the prices of an engine's passes, and measures them again while the engine is idle."""

    @property
    def packed(self) -> bytes:
        """The present prices, for the engine after this one."""

    @property
    def is_due(self) -> bool:
        """Whether `work` has anything to do."""

    def note(self, expected: float, took: float) -> None:
        """A pass of decoding rows took so many milliseconds where so many were expected."""

    def work(self) -> None:
        """A small step of a measurement, of one pass at most. Call only while no sequence runs."""

    def pause(self) -> None:
        """Gives up a measurement that has begun, and all its pages: a request has come."""


class PassWatch:
    """Compares passes with their prices, so many at a time."""

    def __init__(self) -> None:
        self._ratios: list[float] = []
        self.is_doubtful = False

    def note(self, expected: float, took: float) -> None:
        """A pass took so long; `expected` is its price, in the same unit."""
        if expected <= 0 or took <= 0:
            return
        self._ratios.append(took / expected)
        if len(self._ratios) == PASSES:
            self.is_doubtful = not 1 / DOUBT <= median(self._ratios) <= DOUBT
            self._ratios.clear()

    def reset(self) -> None:
        """The prices are new."""
        self._ratios.clear()
        self.is_doubtful = False
