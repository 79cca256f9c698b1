"""What the student learns: the teacher's distribution after every loop, over texts the teacher wrote.

One text a row, padded: the student never reads one conversation behind another. Invariant: the batch of a
step is a function of the seed and the step alone.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.network.looped import LoopedTransformer
from training.distill.data import Example, batches, padded
from training.losses import LoopLosses, Taught, loop_losses
from training.recipe import Recipe, Stage


class Batch(NamedTuple):
    """Texts of like length."""

    ids: Tensor  # (batch, length + 1)
    kept: Tensor  # (batch, length), whether a target is a text's own
    taught: Taught  # of the kept targets


class DistillTask:
    """KL to the teacher at every loop, mixed with cross-entropy as each stage says."""

    def __init__(
        self, examples: list[Example], primer: list[Example], primer_share: float, recipe: Recipe
    ) -> None:
        """`primer_share` of the texts of an epoch are drawn from the primer, if there is one."""
        self.examples, self.primer, self.recipe = examples, primer, recipe
        self._drawn = round(len(examples) * primer_share / (1 - primer_share)) if primer else 0
        self._epoch: list[list[Example]] = []
        self._first_step = self._next_step = self._next_epoch = 0

    def losses(self, model: LoopedTransformer, stage: Stage, step: int) -> LoopLosses:
        """Losses of the step's texts."""
        ids, kept, taught = self.batch(stage, step)
        device = model.device
        there = Taught(*(each.to(device) for each in taught))
        return loop_losses(model, ids.to(device), stage, there, kept.to(device))

    def batch(self, stage: Stage, step: int) -> Batch:
        """The texts of a step, cut to the stage's length."""
        return self.batch_of(self._texts(step), stage.sequence_length)

    def batch_of(self, texts: list[Example], length: int) -> Batch:
        """These texts, their first `length` + 1 pieces."""
        ids, own, _ = padded(texts)
        ids, own = ids[:, : length + 1], own[:, : length + 1]
        width = max((each.labels.ids.shape[1] for each in texts if each.labels), default=1)
        rows = [_labels_of(each, min(length, len(each.ids) - 1), width) for each in texts]
        taught = Taught(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*rows, strict=True)))
        return Batch(torch.from_numpy(ids), torch.from_numpy(own[:, 1:].copy()), taught)

    def _texts(self, step: int) -> list[Example]:
        if step < self._first_step:  # only a resumed or restarted run goes back
            self._first_step = self._next_step = self._next_epoch = 0
        while step >= self._next_step:
            self._epoch = self._batches(self._next_epoch)
            self._first_step = self._next_step
            self._next_step += len(self._epoch)
            self._next_epoch += 1
        return self._epoch[step - self._first_step]

    def _batches(self, epoch: int) -> list[list[Example]]:
        """All texts once, and as many of the primer as their share wants."""
        rng = np.random.default_rng([self.recipe.seed, epoch])
        drawn = rng.integers(0, max(1, len(self.primer)), self._drawn)
        texts = [*self.examples, *(self.primer[index] for index in drawn)]
        lengths = np.asarray([len(each.ids) for each in texts])
        return [[texts[i] for i in part] for part in batches(lengths, self.recipe.tokens_per_step, rng)]


def _labels_of(example: Example, count: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens and probabilities (count, width) of an example's first targets; zeros where nothing is known."""
    if example.labels is None:
        return np.zeros((count, width), dtype=np.int64), np.zeros((count, width), dtype=np.float32)
    return example.labels.ids[:count].astype(np.int64), example.labels.probabilities[:count].astype(
        np.float32
    )
