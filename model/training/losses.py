"""The looped training loss: a loss after every loop, and the pull of early readouts to the last.

Sources: SPEED (Hooper et al. 2023, arXiv 2310.12072): a loss at every loop, heavier for later ones;
Liger (Hsu et al. 2024, arXiv 2410.10989): logits and their gradient a chunk of tokens at a time.
Invariant: logits of one chunk and one loop are the most that is alive at a time (beside those of the
targets), whatever the batch and the number of loops.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.looped import LoopedTransformer
from model.training.recipe import Stage

CHUNK = 2048  # tokens

# Tokens start .. stop - 1 of the batch -> probabilities that a teacher gives their targets (tokens,
# vocab), and which of the tokens have such (tokens,).
Teacher = Callable[[slice], tuple[Tensor, Tensor]]


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
    model: LoopedTransformer, tokens: Tensor, stage: Stage, teacher: Teacher | None = None
) -> LoopLosses:
    """Losses of tokens (batch, length + 1): loop r weighs r ** depth_power, the weights summing to 1.

    With an `agreement_weight`, early loops also learn KL(final || early); the final readout is a
    constant there, so it isn't dragged towards the early ones. Where a teacher gives a token no
    probabilities, its cross-entropy takes the place of KL(teacher || loop).
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    hidden = torch.stack([model.whole_finish(state) for state in model.depths(inputs, stage.num_loops)])
    weights = loop_weights(stage, teacher is not None)
    total, per_loop = _Readouts.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(1, 2), model.head.weight, targets, weights, teacher
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
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor]:
        loops, count = hidden.shape[:2]
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        per_loop = torch.zeros(loops, device=hidden.device)
        for start in range(0, count, CHUNK):
            rows = slice(start, min(start + CHUNK, count))
            taught = None if teacher is None else teacher(rows)
            chunk = _Chunk(head, targets[rows], weights, taught, count)
            for loop in reversed(range(loops)):
                loss, cross_entropy, grad = chunk.loop(hidden[loop, rows], loop)
                total += loss
                per_loop[loop] += cross_entropy
                hidden_grad[loop, rows] = grad @ head
                head_grad += grad.to(hidden.dtype).t() @ hidden[loop, rows]
        ctx.save_for_backward(hidden_grad, head_grad.to(head.dtype))
        ctx.mark_non_differentiable(per_loop)
        return total, per_loop

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # noqa: ANN401
        hidden_grad, head_grad = ctx.saved_tensors
        return hidden_grad * grads[0], head_grad * grads[0], None, None, None


class _Chunk:
    """The readouts of one chunk of tokens, last loop first: the others are pulled towards it."""

    def __init__(
        self,
        head: Tensor,
        targets: Tensor,
        weights: Weights,
        taught: tuple[Tensor, Tensor] | None,
        count: int,
    ) -> None:
        self.head, self.targets, self.weights, self.count = head, targets, weights, count
        self.taught = taught
        self.final: Tensor | None = None  # log-probabilities of the last loop

    def loop(self, hidden: Tensor, loop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, cross-entropy, and the loss's gradient by the logits, of one loop; means over all tokens."""
        data, teacher, agreement = (float(weight[loop]) for weight in self.weights)
        log_p = F.log_softmax((hidden @ self.head.t()).float(), -1)
        pulled = self.final if agreement else None
        if self.final is None:
            self.final = log_p.clone()
        chosen = log_p.gather(1, self.targets[:, None]).squeeze(1)
        on_data = torch.full_like(chosen, data + teacher)  # each token's weight of the cross-entropy
        loss = torch.zeros((), device=hidden.device)
        grad = torch.exp(log_p).mul_(data + teacher + agreement)
        if teacher and self.taught is not None:
            q, known = self.taught
            on_data -= teacher * known
            loss += teacher * (_divergence(q, torch.log(q.clamp_min(1e-20)), log_p) * known).sum()
            grad -= q * (teacher * known)[:, None]
        if pulled is not None:
            loss += agreement * _divergence(pulled.exp(), pulled, log_p).sum()
            grad.sub_(pulled.exp(), alpha=agreement)
        loss -= (chosen * on_data).sum()
        grad.scatter_add_(1, self.targets[:, None], -on_data[:, None])
        return loss / self.count, -chosen.sum() / self.count, grad.div_(self.count)


def _divergence(q: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) of each token, (tokens,)."""
    return (q * (log_q - log_p)).sum(-1)


class Evaluation(NamedTuple):
    """Held-out figures, each a list over loops: nats a token, and greedy tokens equal to the last loop's."""

    loss: list[float]
    agreement: list[float]


@torch.no_grad()
def evaluate(model: LoopedTransformer, windows: Tensor) -> Evaluation:
    """Loss and agreement per loop over windows (count, length + 1), a few windows at a time."""
    loops = model.config.num_loops
    loss, agreement = torch.zeros(loops), torch.zeros(loops)
    for batch in torch.split(windows.to(model.device), 4):
        readouts = [model.whole_readout(s).float().flatten(0, 1) for s in model.depths(batch[:, :-1])]
        targets, final = batch[:, 1:].flatten(), readouts[-1].argmax(-1)
        share = len(batch) / len(windows)
        losses = torch.stack([F.cross_entropy(logits, targets) for logits in readouts])
        equal = torch.stack([(r.argmax(-1) == final).float().mean() for r in readouts])
        loss += share * losses.cpu()
        agreement += share * equal.cpu()
    return Evaluation(loss.tolist(), agreement.tolist())
