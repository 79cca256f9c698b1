"""The encoder of an encoder-decoder model: it reads a source whole, both ways, once.

Knows nothing about loops, caches or requests. Every token sees all of its source, so that a layer needs the
layer below of all of them. Invariant: nothing of one source meets another's.
"""

import torch
from torch import Tensor, nn

from model.network.config import LoopedConfig
from model.network.layers import Layer, ReadBack, Rotary, make_norm, scored_attention
from model.network.relative import RelativeScores

QUERIES = 256  # whose scores are biased together: the bias of a whole source is heads * tokens^2 numbers


class Encoder(nn.Module):
    """Layers that read sources both ways, and a norm."""

    def __init__(self, config: LoopedConfig, rotary: Rotary) -> None:
        super().__init__()
        assert config.encoder is not None
        assert config.relative_bias is not None
        self.layers = nn.ModuleList(Layer(config, rotary) for _ in range(config.encoder.num_layers))
        self.norm = make_norm(config)
        self.relative = RelativeScores(config.relative_bias, config.num_heads, both_ways=True)
        self.scale = config.attention_scale

    def forward(self, embedded: Tensor, seen: Tensor | None, read_back: ReadBack) -> Tensor:
        """What becomes of embedded sources (batch, tokens, hidden), same shape.

        `seen` (batch, tokens), bool: which tokens are a source's own, None: all; what stands at the others
        means nothing. `read_back` is asked for all K and V.
        """
        tokens = embedded.shape[1]
        places = torch.arange(tokens, device=embedded.device)
        table = self.relative(torch.arange(1 - tokens, tokens, device=embedded.device)).t()
        mask = None if seen is None else hidden_from_scores(seen, embedded.dtype)

        def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v, parts = read_back(k), read_back(v), []
            for first in range(0, tokens, QUERIES):
                rows = places[first : first + QUERIES, None]
                bias = table[:, places - rows + tokens - 1]  # (heads, rows, tokens)
                bias = bias if mask is None else bias + mask
                parts.append(scored_attention(q[:, first : first + QUERIES], k, v, bias, self.scale))
            return torch.cat(parts, 1)

        h = embedded
        for layer in self.layers:
            h = layer(0, h, (), attend)
        out: Tensor = self.norm(h)
        return out


def hidden_from_scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that only the tokens `seen` (batch, tokens) count: (batch, 1, 1, tokens)."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None, None]
