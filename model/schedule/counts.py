"""How often each token stands in a sequence, for penalties. No tensors; counts are numpy arrays."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from model.schedule.wave import Wave


class TokenCounts:
    """How often each token stands in the prompt and in the output of one sequence.

    Committed tokens are counted once, when they are first seen; the drafts of a wave are added on top
    for each row, so a flush has nothing to take back.
    """

    def __init__(self, vocab_size: int) -> None:
        self.prompt: NDArray[np.int64] = np.zeros(vocab_size, np.int64)
        self.output: NDArray[np.int64] = np.zeros(vocab_size, np.int64)
        self.num_counted = 0

    def upto(self, wave: "Wave", position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Counts (vocab,) in the prompt and in the output before `position`; read only."""
        if not self.num_counted:
            np.add.at(self.prompt, wave.tokens[: wave.prompt_length], 1)
            self.num_counted = wave.prompt_length
        certain = min(wave.num_committed, position)
        np.add.at(self.output, wave.tokens[self.num_counted : certain], 1)
        self.num_counted = max(self.num_counted, certain)
        drafts = wave.tokens[self.num_counted : position]
        if not drafts:
            return self.prompt, self.output
        output = self.output.copy()
        np.add.at(output, drafts, 1)
        return self.prompt, output
