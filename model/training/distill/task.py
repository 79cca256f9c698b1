"""What the student learns: the teacher's distribution after every loop, over texts the teacher wrote.

The teacher reads its own tokens, the student their pieces (see `vocabulary`). A token's first piece has a
teacher's distribution: that of the full vocabulary, summed over tokens that begin with the same piece.
Its further pieces have none, and are learnt from the text. Invariant: the batch of a step is a function of
the seed and the step alone.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.looped import LoopedTransformer
from model.training.distill.data import Stream
from model.training.distill.vocabulary import Pieces
from model.training.losses import LoopLosses, loop_losses
from model.training.recipe import Recipe, Stage


class Batch(NamedTuple):
    """Windows of both streams that begin with the same text."""

    student: Tensor  # (batch, length + 1)
    teacher: Tensor  # (batch, length)
    rows: Tensor  # (batch * length,), the teacher's flattened position that predicts each target
    known: Tensor  # (batch * length,), whether the target is a first piece


class DistillTask:
    """KL to the teacher at every loop, mixed with cross-entropy as each stage says."""

    def __init__(self, stream: Stream, teacher: LoopedTransformer, pieces: Pieces, recipe: Recipe) -> None:
        self.stream, self.teacher, self.recipe = stream, teacher, recipe
        self._is_first = stream.is_first
        self._first_piece = torch.from_numpy(pieces.first).to(teacher.device)

    def losses(self, model: LoopedTransformer, stage: Stage, step: int) -> LoopLosses:
        """Losses of the step's windows; the teacher runs without gradients."""
        batch = Batch(*(each.to(model.device) for each in self.batch(stage, step)))
        with torch.no_grad():
            state = self.teacher.depths(batch.teacher)[-1]
            hidden = self.teacher.whole_finish(state).flatten(0, 1)[batch.rows]

        def taught(rows: slice) -> tuple[Tensor, Tensor]:
            return self.folded(hidden[rows]), batch.known[rows]

        return loop_losses(model, batch.student, stage, taught)

    def folded(self, hidden: Tensor) -> Tensor:
        """The teacher's probabilities (tokens, cut vocab) from its final states (tokens, hidden)."""
        full = self.teacher.head(hidden).float().softmax(-1)
        cut = torch.zeros(len(full), self.recipe.model.vocab_size, device=full.device)
        size = cut.shape[1]
        cut.copy_(full[:, :size])  # the first tokens are their own pieces
        return cut.index_add_(1, self._first_piece[size:], full[:, size:])

    def batch(self, stage: Stage, step: int) -> Batch:
        """Windows that begin at texts drawn by the seed and the step."""
        rng = np.random.default_rng([self.recipe.seed, step])
        length = stage.sequence_length
        count = max(1, self.recipe.tokens_per_step // length)
        starts = self.stream.starts
        last = int(np.searchsorted(starts, len(self.stream.student.ids) - length - 1))
        return self.windows(starts[rng.integers(0, max(1, last), count)], length)

    def windows(self, starts: NDArray[np.int64], length: int) -> Batch:
        """Windows of `length` tokens behind the given starts of texts."""
        ids, owner = self.stream.student
        student = np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64)
        first_tokens = [owner[s] for s in starts]
        padded = np.pad(self.stream.teacher, (0, length))
        teacher = np.stack([padded[t : t + length] for t in first_tokens]).astype(np.int64)
        known = np.stack([self._is_first[s + 1 : s + length + 1] for s in starts])
        targets = np.stack([owner[s + 1 : s + length + 1] - owner[s] for s in starts])
        rows = np.maximum(targets - 1, 0) + length * np.arange(len(starts))[:, None]
        flat = (torch.from_numpy(each.reshape(-1)) for each in (rows, known))
        return Batch(torch.from_numpy(student), torch.from_numpy(teacher), *flat)
