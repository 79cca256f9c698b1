"""Relative positions as T5 has them: buckets of distances, and a learned number for each bucket and head.

Knows nothing about caches. Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1, and transformers'
`T5Attention._relative_position_bucket`, whose logarithm in fp32 decides where buckets begin.
"""

import math

import torch
from torch import Tensor, nn

from model.network.config import RelativeBias


def buckets_of(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The buckets of distances (...) of at least 0: one each below half of them, then by the logarithm."""
    exact = num_buckets // 2
    ratio = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).long()
    return torch.where(distances < exact, distances, far.clamp(max=num_buckets - 1))


class RelativeScores(nn.Module):
    """The table of one side, shared by all its layers (and, in a looped decoder, by all loops)."""

    def __init__(self, bias: RelativeBias, num_heads: int, *, both_ways: bool) -> None:
        super().__init__()
        self.bias, self.both_ways = bias, both_ways
        self.weight = nn.Parameter(torch.zeros(bias.num_buckets, num_heads))

    def forward(self, ahead: Tensor) -> Tensor:
        """What is added to the scores (..., heads) of keys that stand so far `ahead` (...) of the query.

        Below 0 it stands before the query. One side that sees nothing ahead takes it for itself.
        """
        size, distance = self.bias.num_buckets, (-ahead).clamp(min=0)
        if self.both_ways:
            size, distance = size // 2, ahead.abs()
        bucket = buckets_of(distance, size, self.bias.max_distance)
        if self.both_ways:
            bucket = bucket + size * (ahead > 0)
        return self.weight[bucket]

    def upto_distance(self, most: int) -> Tensor:
        """What is added by distance back, (distances, heads), from 0 on: beyond the last it is the same.

        `most` is the longest distance there is.
        """
        count = min(self.bias.max_distance, most) + 1
        found: Tensor = self(-torch.arange(count, device=self.weight.device))
        return found
