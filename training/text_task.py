"""Training on a text: windows at random offsets of one long array of tokens, and held-out windows.

Invariant: the batch of a step is a function of the seed and the step alone.
"""

import numpy as np
import torch
from torch import Tensor

from model.network.looped import LoopedTransformer
from training.corpus import Tokens
from training.losses import LoopLosses, loop_losses
from training.recipe import Recipe, Stage


class TextTask:
    """Cross-entropy at every loop on windows of `tokens`."""

    def __init__(self, tokens: Tokens, recipe: Recipe) -> None:
        self.tokens, self.recipe = tokens, recipe

    def losses(self, model: LoopedTransformer, stage: Stage, step: int) -> LoopLosses:
        """Losses of the step's windows."""
        return loop_losses(model, self.batch(stage, step).to(model.device), stage)

    def batch(self, stage: Stage, step: int) -> Tensor:
        """Windows at random offsets (batch, length + 1)."""
        rng = np.random.default_rng([self.recipe.seed, step])
        count = max(1, self.recipe.tokens_per_step // stage.sequence_length)
        starts = rng.integers(0, len(self.tokens) - stage.sequence_length - 1, count)
        return windows_at(self.tokens, starts, stage.sequence_length)


def windows_at(tokens: Tokens, starts: np.typing.NDArray[np.int64], length: int) -> Tensor:
    """Windows (count, length + 1) that begin at `starts`."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts])
    return torch.from_numpy(rows.astype(np.int64))


def spread_windows(tokens: Tokens, count: int, length: int) -> Tensor:
    """`count` windows (count, length + 1), evenly spread over the tokens."""
    return windows_at(tokens, np.linspace(0, len(tokens) - length - 1, count).astype(np.int64), length)
