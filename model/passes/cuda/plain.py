"""The operations of a pass in plain torch: slow, obvious, and what the kernels are held to.

Row by row where torch would round by the number of rows, so that this too keeps the promise of `Operations`.
"""

import torch
from torch import Tensor

from model.passes.cuda.operations import Asked, Cache, Norms, Parts, Places, Shape
from model.passes.cuda.weights import Matrix
from model.passes.noise import gumbel_noise_torch


class PlainOperations:
    """The operations without a kernel of ours."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def product(self, x: Tensor, matrix: Matrix) -> Parts:
        """Row by row, in one part."""
        weight = matrix.weight.float()
        return Parts(torch.stack([weight @ row for row in x.float()])[None], matrix)

    def gated(self, x: Tensor, matrix: Matrix) -> Tensor:
        """The two halves of one product."""
        gate, up = _finished(self.product(x, matrix)).chunk(2, -1)
        return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)

    def join(self, parts: Parts | None, state: Tensor | None, norms: Norms) -> tuple[Tensor, Tensor]:
        """The sum, and the norms that there are."""
        if parts is not None:
            y = self._normed(_finished(parts), norms.output)
            state = y if state is None else state + y
        assert state is not None
        y = self._normed(state, norms.sum)
        return y, self._normed(y, norms.next).to(self.shape.dtype)

    def _normed(self, y: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return y
        mean = torch.stack([row.square().mean() for row in y])[:, None]
        return y * torch.rsqrt(mean + self.shape.config.norm_eps) * weight.float()

    def rotate(self, parts: Parts, more: Tensor | None, places: Places, cache: Cache) -> Tensor:
        """Each channel with the one that it is paired with."""
        config = self.shape.config
        heads = _finished(parts).view(parts.sums.shape[1], -1, config.head_dim)
        rotated = config.num_heads + config.num_kv_heads
        qk, v = heads[:, :rotated], heads[:, rotated:]
        if more is not None:
            qk = qk + more.float()
        turned = config.rotary_dim
        half, channel = turned // 2, torch.arange(turned, device=qk.device)
        partner = channel ^ 1 if config.rope.interleaved else (channel + half) % turned
        cosines, sines = (
            table[places.positions][:, None] for table in (self.shape.cosines, self.shape.sines)
        )
        front = qk[..., :turned] * cosines + qk[..., :turned][..., partner] * sines
        qk = torch.cat((front, qk[..., turned:]), -1)
        cache.keys[places.entries] = qk[:, config.num_heads :].to(self.shape.dtype)
        cache.values[places.entries] = v.to(self.shape.dtype)
        return qk[:, : config.num_heads] * self.shape.attention_scale

    def attend(self, queries: Tensor, places: Places, cache: Cache, window: int) -> Tensor:
        """A softmax over what each row sees."""
        out, size = torch.zeros_like(queries), self.shape.page_size
        for row, end in enumerate(places.ends.tolist()):
            seen = torch.arange(max(0, end - window) if window else 0, end, device=queries.device)
            if not len(seen):
                continue
            pages = places.pages[places.tables[row] + seen // size]
            entries = places.offsets[row] + pages * size + seen % size
            keys, values = (_per_head(kept[entries], queries.shape[1]) for kept in cache)
            shares = (keys @ queries[row][:, :, None])[..., 0].softmax(-1)  # (heads, seen)
            out[row] = (shares[:, None] @ values)[:, 0]
        return out.flatten(1).to(self.shape.dtype)

    def choose(self, logits: Parts, asked: Asked) -> Tensor:
        """The greatest score of each row; what is no number counts as infinite."""
        numbers = _finished(logits)
        out = torch.zeros(len(numbers), 2, dtype=torch.float64, device=numbers.device)
        for row, temperature in enumerate(asked.temperatures.tolist()):
            scores = numbers[row]
            if temperature > 0:
                one = slice(row, row + 1)
                scores = scores / temperature + self.noise(asked.seeds[one], asked.positions[one])[0]
            if temperature >= 0:
                token = int(scores.nan_to_num(torch.inf, torch.inf, -torch.inf).argmax())
                out[row] = torch.stack((torch.tensor(float(token)), numbers[row, token].cpu())).double()
        return out

    def noise(self, seeds: Tensor, positions: Tensor) -> Tensor:
        """By eager operators."""
        keys = list(zip(seeds.tolist(), positions.tolist(), strict=True))
        return gumbel_noise_torch(keys, self.shape.config.vocab_size, seeds.device)


def _per_head(kept: Tensor, heads: int) -> Tensor:
    """K or V (seen, kv_heads, dim) for each query head, (heads, seen, dim), fp32."""
    return kept.float().repeat_interleave(heads // kept.shape[1], 1).transpose(0, 1)


def _finished(parts: Parts) -> Tensor:
    """The outputs of a product, (rows, outputs), with scales and biases."""
    y = parts.sums.sum(0)
    if parts.matrix.scales is not None:
        y = y * parts.matrix.scales
    return y if parts.matrix.biases is None else y + parts.matrix.biases.float()
