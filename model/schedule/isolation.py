"""Whose fault it was that a pass failed: sequences are tried again in halves, and at last alone. Pure Python.

An exception in a pass may not say whose rows it met. All sequences that ran are read again, half of them
at a time; a half that fails is halved again, and a sequence that has failed alone twice is at fault.
Nobody else runs while a group is on trial. Invariant: each failure halves a group or counts a strike, and
a group without one ends its trial, so trials end.
"""

from collections import abc

from model.schedule.queue import WaitingQueue
from model.schedule.sequence import Sequence
from model.schedule.wave import Wave

MOST_STRIKES = 2


class Trial:
    """Sequences that run with nobody else until each has passed the place where it stood in the pass.

    `queue` holds those that have no pages yet.
    """

    def __init__(self, places: dict[Sequence, int]) -> None:
        """`places` says what each sequence must have done again, as `place_of` counts it."""
        self._places = dict(places)
        self.queue = WaitingQueue()
        for sequence in places:
            self.queue.push(sequence)

    @property
    def is_over(self) -> bool:
        """Whether nobody here can have been at fault, or is left."""
        return all(sequence.wave.num_complete >= place for sequence, place in self._places.items())

    @property
    def places(self) -> dict[Sequence, int]:
        """What each sequence that is left must have done again."""
        return self._places

    def drop(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._places.pop(sequence, None)


def place_of(wave: Wave) -> int:
    """How many positions must be complete for the wave to have done what it does now, and a bit more."""
    return max(1, wave.num_entered) if wave.is_reading_prompt else wave.num_committed


def trials_of(suspects: dict[Sequence, int]) -> abc.Sequence[Trial]:
    """The halves of those that ran in a pass that failed, the last one to be tried first.

    A lone suspect gets a strike; there is no trial for one that has too many.
    """
    order = sorted(suspects, key=lambda sequence: sequence.precedence)
    if len(order) == 1:
        order[0].strikes += 1
        return [Trial(suspects)] if order[0].strikes < MOST_STRIKES else []
    half = len(order) // 2
    return [Trial({each: suspects[each] for each in part}) for part in (order[half:], order[:half])]
