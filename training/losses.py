"""The looped training loss: a loss after every loop, and the pull of early readouts to the last.

Sources: SPEED (Hooper et al. 2023, arXiv 2310.12072): a loss at every loop, heavier for later ones;
Liger (Hsu et al. 2024, arXiv 2410.10989): logits and their gradient a chunk of tokens at a time.
Invariant: logits of one chunk and one loop are the most that is alive at a time (beside those of the
targets), whatever the batch and the number of loops.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.looped import LoopedTransformer, Source
from training.recipe import Stage

CHUNK = 512  # tokens


class Taught(NamedTuple):
    """What a teacher holds for likely at each target: a few tokens, and any other at probability 0."""

    ids: Tensor  # (tokens, n)
    probabilities: Tensor  # (tokens, n), a row sums to 1; or to 0: the teacher has no word on this token


class LoopLosses(NamedTuple):
    """`total` to differentiate; `per_loop` cross-entropy in nats a token, detached."""

    total: Tensor
    per_loop: Tensor  # (loops,)


class Weights(NamedTuple):
    """What each loop's readout weighs, a list over loops each."""

    data: Tensor  # cross-entropy with the text
    teacher: Tensor  # KL(teacher || loop)
    agreement: Tensor  # KL(last loop || loop), the last loop a constant


def loop_losses(
    model: LoopedTransformer,
    tokens: Tensor,
    stage: Stage,
    taught: Taught | None = None,
    kept: Tensor | None = None,
    *,
    source: Source | None = None,
) -> LoopLosses:
    """Losses of tokens (batch, length + 1): loop r weighs r ** depth_power, the weights summing to 1.

    `kept` (batch, length), bool: which targets count; None is all. `taught` is of those. `source` is what a
    model with an encoder made of the texts' sources.

    With an `agreement_weight`, early loops also learn KL(final || early); the final readout is a
    constant there, so it isn't dragged towards the early ones. Where a teacher gives a token no
    probabilities, its cross-entropy takes the place of KL(teacher || loop).
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    states = model.depths(inputs, stage.num_loops, source=source)
    hidden = torch.stack([model.whole_finish(state) for state in states]).flatten(1, 2)
    if model.config.head_scale != 1.0:
        hidden = hidden * model.config.head_scale
    if kept is not None:
        hidden, targets = hidden[:, kept.flatten()], targets[kept.flatten()]
    weights = loop_weights(stage, taught is not None)
    total, per_loop = _Readouts.apply(  # type: ignore[no-untyped-call]
        hidden, model.head.weight, targets, weights, taught
    )
    return LoopLosses(total, per_loop)


def loop_weights(stage: Stage, has_teacher: bool) -> Weights:
    """The weights of a stage's loops; without a teacher all goes to cross-entropy."""
    depths = torch.arange(1, stage.num_loops + 1, dtype=torch.float32) ** stage.depth_power
    share = depths / depths.sum()
    agreement = torch.full((stage.num_loops,), stage.agreement_weight / max(1, stage.num_loops - 1))
    agreement[-1] = 0.0
    taught = stage.teacher_weight if has_teacher else 0.0
    return Weights((1 - taught) * share, taught * share, agreement)


class _Readouts(torch.autograd.Function):
    """Losses of all loops' readouts; their gradient is known in closed form and made on the way.

    For logits z with p = softmax(z), d CE / dz = p - onehot and d KL(q || p) / dz = p - q.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  (torch passes them by position)
        ctx: Any,  # noqa: ANN401  (torch's own type is private)
        hidden: Tensor,  # (loops, tokens, hidden)
        head: Tensor,  # (vocab, hidden)
        targets: Tensor,  # (tokens,)
        weights: Weights,
        taught: Taught | None,
    ) -> tuple[Tensor, Tensor]:
        loops, count = hidden.shape[:2]
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        per_loop = torch.zeros(loops, device=hidden.device)
        for start in range(0, count, CHUNK):
            rows = slice(start, min(start + CHUNK, count))
            part = None if taught is None else Taught(*(each[rows] for each in taught))
            chunk = _Chunk(head, targets[rows], weights, part, count)
            for loop in reversed(range(loops)):
                loss, cross_entropy, grad = chunk.loop(hidden[loop, rows], loop)
                total += loss
                per_loop[loop] += cross_entropy
                hidden_grad[loop, rows] = grad @ head.to(grad.dtype)
                head_grad += grad.t() @ hidden[loop, rows].to(grad.dtype)
        ctx.save_for_backward(hidden_grad, head_grad.to(head.dtype))
        ctx.mark_non_differentiable(per_loop)
        return total, per_loop

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # noqa: ANN401
        hidden_grad, head_grad = ctx.saved_tensors
        return hidden_grad * grads[0], head_grad * grads[0], None, None, None


class _Chunk:
    """The readouts of one chunk of tokens, last loop first: the others are pulled towards it.

    Passes over (tokens, vocab) are what this costs on a CPU, so there are few, in the logits' own dtype; in
    bf16 the losses are off by the rounding of a probability, a few thousandths of a nat.
    """

    def __init__(
        self, head: Tensor, targets: Tensor, weights: Weights, taught: Taught | None, count: int
    ) -> None:
        self.head, self.targets, self.weights, self.count = head, targets[:, None], weights, count
        self.taught = taught
        self.final: tuple[Tensor, Tensor, Tensor] | None = (
            None  # the last loop's logits, probabilities, log-sums
        )

    def loop(self, hidden: Tensor, loop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, cross-entropy, and the loss's gradient by the logits, of one loop; means over all tokens."""
        data, teacher, agreement = (float(weight[loop]) for weight in self.weights)
        logits = hidden @ self.head.t()  # (tokens, vocab)
        probabilities = logits.softmax(-1)
        log_sum = logits.amax(-1).float() - probabilities.amax(-1).float().log()  # of exp(logits)
        cross_entropy = log_sum - logits.gather(1, self.targets).squeeze(1)
        pulled = self.final if agreement else None
        if self.final is None:
            self.final = logits, probabilities.clone(), log_sum
        on_data = torch.full_like(log_sum, data + teacher)  # each token's weight of the cross-entropy
        grad, loss = probabilities.mul_((data + teacher + agreement) / self.count), torch.zeros_like(log_sum)
        if teacher and self.taught is not None:
            ids, q = self.taught
            known = teacher * q.sum(-1)
            on_data -= known
            log_q, log_p = torch.log(q.clamp_min(1e-20)), logits.gather(1, ids).float() - log_sum[:, None]
            loss += teacher * (q * (log_q - log_p)).sum(-1)
            grad.scatter_add_(1, ids, (-teacher / self.count * q).to(grad.dtype))
        if pulled is not None:
            last, target, last_sum = pulled
            apart = torch.linalg.vecdot(target, last - logits).float()
            loss += agreement * (apart + log_sum - last_sum)
            grad.sub_(target, alpha=agreement / self.count)
        loss += cross_entropy * on_data
        grad.scatter_add_(1, self.targets, (-on_data / self.count).to(grad.dtype)[:, None])
        return loss.sum() / self.count, cross_entropy.sum() / self.count, grad


class Evaluation(NamedTuple):
    """Held-out figures, each a list over loops: nats a token, and greedy tokens equal to the last loop's."""

    loss: list[float]
    agreement: list[float]


@torch.no_grad()
def evaluate(model: LoopedTransformer, windows: Tensor, kept: Tensor | None = None) -> Evaluation:
    """Loss and agreement per loop over windows (count, length + 1), a few windows at a time.

    `kept` (count, length), bool: which targets count; None is all.
    """
    loops = model.config.num_loops
    loss, agreement = torch.zeros(loops), torch.zeros(loops)
    kept = torch.ones_like(windows[:, 1:], dtype=torch.bool) if kept is None else kept
    for batch, chosen in zip(torch.split(windows, 4), torch.split(kept, 4), strict=True):
        counted = chosen.flatten().to(model.device)
        states = model.depths(batch[:, :-1].to(model.device))
        readouts = [model.whole_readout(state).float().flatten(0, 1)[counted] for state in states]
        targets, final = batch[:, 1:].to(model.device).flatten()[counted], readouts[-1].argmax(-1)
        loss += torch.stack([F.cross_entropy(r, targets, reduction="sum") for r in readouts]).cpu()
        agreement += torch.stack([(r.argmax(-1) == final).sum() for r in readouts]).cpu()
    total = int(kept.sum())
    return Evaluation((loss / total).tolist(), (agreement / total).tolist())
