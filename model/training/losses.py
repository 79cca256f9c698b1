"""The looped training loss: cross-entropy after every loop, and the pull of early readouts to the last.

Source: SPEED (Hooper et al. 2023, arXiv 2310.12072): a loss at every loop, heavier for later ones.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.looped import LoopedTransformer
from model.training.recipe import Stage


class LoopLosses(NamedTuple):
    """`total` to differentiate; `per_loop` cross-entropy in nats a token, detached."""

    total: Tensor
    per_loop: Tensor  # (loops,)


def loop_losses(model: LoopedTransformer, tokens: Tensor, stage: Stage) -> LoopLosses:
    """Losses of tokens (batch, length + 1): loop r weighs r ** depth_power, the weights summing to 1.

    With an `agreement_weight`, early loops also learn KL(final || early); the final readout is a
    constant there, so it isn't dragged towards the early ones.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    readouts = [model.whole_readout(s).float().flatten(0, 1) for s in model.depths(inputs, stage.num_loops)]
    each = torch.stack([F.cross_entropy(logits, targets) for logits in readouts])
    weights = torch.arange(1, stage.num_loops + 1, dtype=torch.float32) ** stage.depth_power
    total = (each * weights / weights.sum()).sum()
    if stage.agreement_weight and stage.num_loops > 1:
        final = readouts[-1].detach().log_softmax(-1)
        pulls = [_divergence(final, early) for early in readouts[:-1]]
        total = total + stage.agreement_weight * torch.stack(pulls).mean()
    return LoopLosses(total, each.detach())


def _divergence(final: Tensor, early: Tensor) -> Tensor:
    return F.kl_div(early.log_softmax(-1), final, reduction="batchmean", log_target=True)


class Evaluation(NamedTuple):
    """Held-out figures, each a list over loops: nats a token, and greedy tokens equal to the last loop's."""

    loss: list[float]
    agreement: list[float]


@torch.no_grad()
def evaluate(model: LoopedTransformer, windows: Tensor) -> Evaluation:
    """Loss and agreement per loop over windows (count, length + 1), a few windows at a time."""
    loops = model.config.num_loops
    loss, agreement = torch.zeros(loops), torch.zeros(loops)
    for batch in torch.split(windows, 4):
        readouts = [model.whole_readout(s).float().flatten(0, 1) for s in model.depths(batch[:, :-1])]
        targets, final = batch[:, 1:].flatten(), readouts[-1].argmax(-1)
        share = len(batch) / len(windows)
        loss += share * torch.stack([F.cross_entropy(logits, targets) for logits in readouts])
        agreement += share * torch.stack([(r.argmax(-1) == final).float().mean() for r in readouts])
    return Evaluation(loss.tolist(), agreement.tolist())
