"""How often each token stands in a sequence, for penalties. No tensors; counts are numpy arrays."""

from array import array
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from model.schedule.wave import Wave


class Counted(NamedTuple):
    """The distinct tokens of a text, and how often each stands behind its prompt; read only."""

    tokens: NDArray[np.int32]
    outputs: NDArray[np.int32]


class TokenCounts:
    """Which tokens stand in a sequence, and how often each stands in its output.

    Committed tokens are counted once, when they are first seen; the drafts of a wave are added on top
    for each row, so a flush has nothing to take back.
    """

    def __init__(self) -> None:
        self._place: dict[int, int] = {}  # token -> index in the two arrays
        self._tokens, self._outputs = array("i"), array("i")
        self._num_counted = 0

    def upto(self, wave: "Wave", position: int) -> Counted:
        """The counts before `position`, which lies behind the prompt."""
        if not self._num_counted:
            self._tokens.extend(dict.fromkeys(wave.tokens[: wave.prompt_length]))
            self._outputs.extend([0] * len(self._tokens))
            self._place = {token: place for place, token in enumerate(self._tokens)}
            self._num_counted = wave.prompt_length
        certain = max(self._num_counted, min(wave.num_committed, position))
        for token in wave.tokens[self._num_counted : certain]:
            _count(token, self._place, self._tokens, self._outputs)
        self._num_counted = certain
        drafts = wave.tokens[certain:position]
        if not drafts:
            return _read_only(self._tokens, self._outputs)
        place, tokens, outputs = dict[int, int](), self._tokens[:], self._outputs[:]
        for token in drafts:
            if token in self._place:
                outputs[self._place[token]] += 1
            else:
                _count(token, place, tokens, outputs)
        return _read_only(tokens, outputs)


def _count(token: int, place: dict[int, int], tokens: "array[int]", outputs: "array[int]") -> None:
    if token not in place:
        place[token] = len(tokens)
        tokens.append(token)
        outputs.append(0)
    outputs[place[token]] += 1


def _read_only(tokens: "array[int]", outputs: "array[int]") -> Counted:
    # Copies: an array that numpy looks at could not grow any more.
    return Counted(np.array(tokens, np.int32), np.array(outputs, np.int32))
