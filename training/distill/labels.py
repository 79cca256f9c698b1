"""What the teacher says of its texts, once for all epochs: its likeliest next tokens, in the student's.

The teacher reads its own tokens, the student their pieces (see `vocabulary`). A token's first piece has a
teacher's distribution: that of the full vocabulary, summed over tokens that begin with the same piece.
Its further pieces have none, and are learnt from the text. A conversation is read behind the system prompt
that it was written behind. Invariant: a text's labels depend on that text and the teacher alone.
"""

import numpy as np
import torch
from torch import Tensor

from model.network.looped import LoopedTransformer
from training.distill.data import Ids, Labels
from training.distill.vocabulary import Pieces, encode

LIKELIEST = (
    32  # tokens that are kept: of this teacher's, at most a few hundredths of the probability are outside
)
TOKENS_AT_ONCE = 2048


class Labeller:
    """Labels texts with one teacher."""

    def __init__(
        self, teacher: LoopedTransformer, pieces: Pieces, system: list[int], turn_start: int
    ) -> None:
        self.teacher, self.pieces, self.turn_start = teacher, pieces, turn_start
        self.system = np.asarray(system, dtype=np.uint16)
        self._first = torch.from_numpy(pieces.first).to(teacher.device)

    @torch.inference_mode()
    def labels(self, texts: list[Ids]) -> list[Labels]:
        """The labels of each text, in order."""
        found: dict[int, Labels] = {}
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        while order:
            longest = len(texts[order[-1]]) + len(self.system)
            chosen = order[-max(1, TOKENS_AT_ONCE // longest) :]
            del order[-len(chosen) :]
            found.update(zip(chosen, self._batch([texts[index] for index in chosen]), strict=True))
        return [found[index] for index in range(len(texts))]

    def _batch(self, texts: list[Ids]) -> list[Labels]:
        read = [np.concatenate((self._prompt(text), text)) for text in texts]
        ids = np.zeros((len(read), max(map(len, read))), dtype=np.int64)
        for row, tokens in enumerate(read):
            ids[row, : len(tokens)] = tokens
        state = self.teacher.depths(torch.from_numpy(ids).to(self.teacher.device))[-1]
        hidden = self.teacher.whole_finish(state)
        return [self._of(text, hidden[row, len(self._prompt(text)) :]) for row, text in enumerate(texts)]

    def _prompt(self, text: Ids) -> Ids:
        return self.system if text[0] == self.turn_start else self.system[:0]

    def _of(self, text: Ids, hidden: Tensor) -> Labels:
        """Labels of one text from the teacher's final states (tokens, hidden) over it."""
        owner = encode(text, self.pieces).owner
        ids, probabilities = self.likeliest(hidden[: len(text) - 1])
        # The target behind piece j is piece j + 1: known if it is the first of the next token.
        known = owner[1:] != owner[:-1]
        rows = owner[:-1].clip(max=len(ids) - 1)
        return Labels(ids[rows], np.where(known[:, None], probabilities[rows], np.float16(0)))

    def likeliest(self, hidden: Tensor) -> tuple[Ids, np.typing.NDArray[np.float16]]:
        """The likeliest tokens of the cut vocabulary, and probabilities that sum to 1 (tokens, likeliest)."""
        full = self.teacher.head(hidden).float().softmax(-1)
        count = min(2 * LIKELIEST, full.shape[-1])
        probabilities, tokens = full.topk(count)
        pieces = self._first[tokens]
        order = pieces.argsort(-1)
        pieces, probabilities = pieces.gather(1, order), probabilities.gather(1, order)
        # Equal pieces now stand side by side; each run's sum goes to its first.
        new = torch.ones_like(pieces, dtype=torch.bool)
        new[:, 1:] = pieces[:, 1:] != pieces[:, :-1]
        sums = torch.zeros_like(probabilities).scatter_add_(1, new.cumsum(1) - 1, probabilities)
        kept = torch.zeros_like(pieces).scatter_(1, new.cumsum(1) - 1, pieces)
        best, places = sums.topk(min(LIKELIEST, count))
        best = best / best.sum(-1, keepdim=True)
        return kept.gather(1, places).cpu().numpy().astype(np.uint16), best.cpu().numpy().astype(np.float16)
