"""Which of a teacher's layers it misses least: one after the other, the one whose loss costs least.

Greedy removal: every layer that is left is tried without, on the same texts. Knows nothing about students.
Invariant: the layers found are a function of the teacher and the texts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.layers import causal_attention
from model.network.looped import LoopedTransformer
from training.distill.data import Ids


class Pruner:
    """A teacher, and texts to judge its layers by."""

    def __init__(self, teacher: LoopedTransformer, texts: Sequence[Ids]) -> None:
        self.teacher = teacher
        ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
        own = np.zeros(ids.shape, dtype=bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)], own[row, : len(text)] = text, True
        self.ids = torch.from_numpy(ids).to(teacher.device)
        self.own = torch.from_numpy(own[:, 1:].copy()).to(teacher.device)

    def removals(self) -> Iterator[tuple[int, float]]:
        """The layers in the order in which they are missed least, each with the loss without it and those
        before it, in nats a token; the last layer stays.
        """
        left = list(range(self.teacher.config.num_layers))
        while len(left) > 1:
            losses = {layer: self.loss([each for each in left if each != layer]) for layer in left}
            least = min(losses, key=losses.__getitem__)
            left.remove(least)
            yield least, losses[least]

    @torch.inference_mode()
    def loss(self, layers: Sequence[int]) -> float:
        """Cross-entropy of the texts with these layers alone, in order."""
        teacher = self.teacher
        angles = teacher.angles(torch.arange(self.ids.shape[1] - 1, device=teacher.device))

        def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, k, v)

        state = teacher.embedding(self.ids[:, :-1])
        for layer in layers:
            state = teacher.layers[layer](layer, state, angles, attend)
        logits = teacher.head(teacher.norm(state[self.own])).float()
        return float(F.cross_entropy(logits, self.ids[:, 1:][self.own]))
