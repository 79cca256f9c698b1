"""The shared maths of every family: RMSNorm placement, rotary embedding, attention inputs, gated MLP.

Knows nothing about loops, caches or files. A layer is given an `Attend` callable and never learns
where K and V live, so the same weights serve training (whole sequences) and the engine (ragged rows).
Invariant: a module keeps no state but its weights; all leading dimensions of an input are batch.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.config import (
    ConfigError,
    LoopedConfig,
    NormKind,
    NormPlacement,
    RopeConfig,
    UnitScales,
)

# (layer index, q, k, v) -> attention output; q, k, v are (..., heads, head_dim), q already rotated.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
ReadBack = Callable[[Tensor], Tensor]  # what is read of K or V (..., head_dim) that was stored
Angles = tuple[Tensor, ...]  # cos and sin, and those of the second rotary embedding where there is one


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# The names of transformers' ACT2FN; `config.ACTIVATIONS` lists the same ones (a test compares them).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "mish": F.mish,
}


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), the mean in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size = (size,)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x (..., size), same shape and dtype."""
        return F.rms_norm(x, self.size, self.weight, self.eps)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


class PlainNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a weight, in fp32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x, same shape and dtype."""
        return F.rms_norm(wide(x), x.shape[-1:], None, self.eps).to(x.dtype)


class UnitNorm(nn.Module):
    """x / sqrt(sum(x^2) + eps) over the last dimension: unit length, in fp32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x, same shape and dtype."""
        numbers = wide(x)
        return (numbers * torch.rsqrt(numbers.square().sum(-1, keepdim=True) + self.eps)).to(x.dtype)


def make_norm(config: LoopedConfig) -> nn.Module:
    """A norm over the hidden channels, of the model's kind."""
    if config.norm_kind is NormKind.UNIT:
        return UnitNorm(config.norm_eps)
    if config.norm_kind is NormKind.PLAIN:
        return PlainNorm(config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps)


def rotary_frequencies(rope: RopeConfig, rotary_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies, fp32 (rotary_dim / 2,), and the factor that scales cos and sin.

    The formulas of transformers' `modeling_rope_utils` for default, linear, llama3, longrope and yarn;
    ConfigError for any other kind. Always on the CPU: a model built on the meta device needs them too.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rotary_dim
    base = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return base, 1.0
    if rope.kind == "linear":
        return base / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, base, max_positions), 1.0
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, base, rotary_dim, max_positions)
    if rope.kind == "longrope":
        return base / torch.tensor(rope.divisors, device="cpu"), rope.attention_factor or 1.0
    raise ConfigError(
        f"rope kind {rope.kind!r} is not supported; default, linear, llama3, longrope, yarn are"
    )


def _llama3_frequencies(rope: RopeConfig, base: Tensor, max_positions: int) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    original = rope.original_max_positions or max_positions
    wavelength = 2 * math.pi / base
    low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * base / rope.factor + smooth * base
    stretched = torch.where(wavelength > low, base / rope.factor, base)
    return torch.where((wavelength <= low) & (wavelength >= high), between, stretched)


def _yarn_frequencies(
    rope: RopeConfig, base: Tensor, rotary_dim: int, max_positions: int
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolate low frequencies, keep high ones."""
    original = rope.original_max_positions or max_positions

    def dimension_of(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    # high < low happens (a tiny original context) and turns the ramp round, in the reference as well
    width = high - low or 0.001
    steps = torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((steps - low) / width).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


class Rotary(nn.Module):
    """cos and sin of a batch of positions; the sign of the rotation is folded into sin.

    The frequencies stay fp32 whatever the module is cast to: bf16 frequencies are a known trap.
    """

    def __init__(self, config: LoopedConfig, rope: RopeConfig | None = None) -> None:
        """`rope` is the config's first one by default."""
        super().__init__()
        self.rope = rope or config.rope
        self.rotary_dim = config.rotary_dim
        self.max_positions = config.max_positions
        self.interleaved = self.rope.interleaved
        frequencies, self.scaling = rotary_frequencies(self.rope, self.rotary_dim, self.max_positions)
        # Plain attributes: neither `.to(bf16)` nor `to_empty` touches them. One entry for each channel.
        signs = torch.ones_like(frequencies) * self.scaling
        if self.interleaved:
            self._frequencies = frequencies.repeat_interleave(2)
            self._signs = torch.stack((-signs, signs), -1).flatten()
        else:
            self._frequencies = torch.cat((frequencies, frequencies))
            self._signs = torch.cat((-signs, signs))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin of `positions` (...), each (..., 1, rotary_dim), ready to broadcast over heads."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
            self._signs = self._signs.to(positions.device)
        angles = positions[..., None, None] * self._frequencies  # (..., 1, rotary_dim)
        cos = angles.cos() if self.scaling == 1.0 else angles.cos() * self.scaling
        return cos.to(dtype), (angles.sin() * self._signs).to(dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates x (..., heads, head_dim) by its position; channels past rotary_dim pass through."""
        turned = x if self.rotary_dim == x.shape[-1] else x[..., : self.rotary_dim]
        turned = torch.addcmul(turned * cos, self.swapped(turned), sin)
        return turned if turned.shape == x.shape else torch.cat((turned, x[..., self.rotary_dim :]), -1)

    def swapped(self, turned: Tensor) -> Tensor:
        """Each channel (..., rotary_dim) in the place of the one that it is paired with."""
        if self.interleaved:
            return turned.reshape(*turned.shape[:-1], -1, 2).flip(-1).flatten(-2)
        return turned.roll(self.rotary_dim // 2, -1)  # the halves change places


class Attention(nn.Module):
    """Projections, rotary embedding and output of one attention sub-layer; `attend` does the rest."""

    def __init__(self, config: LoopedConfig, rotary: Rotary) -> None:
        super().__init__()
        c = config
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        gated = c.num_heads if c.output_gate else 0
        width = (c.num_heads + 2 * c.num_kv_heads + gated) * c.head_dim
        self.num_gate_heads = gated  # the first ones of the product, before q, k and v
        self.qkv_proj = nn.Linear(c.hidden_size, width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.output_bias)
        self.is_rotated = c.relative_bias is None
        self.rotary = [rotary]  # in a list: shared by all layers, not a sub-module of each
        if c.qk_norm:
            self.q_norm = RMSNorm(c.num_heads * c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.num_kv_heads * c.head_dim, c.norm_eps)
        if c.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(c.num_heads + c.num_kv_heads, c.head_dim))
        self.has_qk_norm, self.has_qk_bias = c.qk_norm, c.qk_bias
        if c.first_loop_gate:
            self.gate_weight = nn.Parameter(torch.zeros(c.num_heads, c.head_dim))
            self.gate_bias = nn.Parameter(torch.zeros(c.num_heads))
            self.gate_activation: Callable[[Tensor], Tensor] = torch.sigmoid
        self.scales = c.unit_scales
        if c.unit_scales:
            self.unit = UnitNorm(c.norm_eps)
            self.query_scale = nn.Parameter(torch.ones(c.num_heads * c.head_dim))
            self.gate_scale = nn.Parameter(torch.ones(c.num_heads * c.head_dim))

    def forward(self, layer: int, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """Attention of x (..., hidden) for the layer with this index; same shape out."""
        gate, qkv = self._parted(self.qkv_proj(x))
        heads = qkv.view(*qkv.shape[:-1], -1, self.head_dim)  # (..., heads + 2 kv_heads, head_dim)
        rotated = self.num_heads + self.num_kv_heads
        qk, v = heads[..., :rotated, :], heads[..., rotated:, :]
        if self.has_qk_norm:
            qk = self._normalised(qkv)
        if self.has_qk_bias:
            qk = qk + self.qk_bias
        if self.is_rotated:
            qk = self.rotary[0].rotate(qk, *angles)
        q, k = qk[..., : self.num_heads, :], qk[..., self.num_heads :, :]
        if self.scales:
            q, k = self._scaled(self.unit(q)), self.unit(k)
        out = attend(layer, q, k, v).flatten(-2)
        projected: Tensor = self.o_proj(out if gate is None else self._gated(out, gate))
        return projected

    def _parted(self, product: Tensor) -> tuple[Tensor | None, Tensor]:
        """The output gate's logits, if there is one, and q, k and v side by side."""
        split = self.gate_size
        return (product[..., :split], product[..., split:].contiguous()) if split else (None, product)

    def _scaled(self, q: Tensor) -> Tensor:
        """Unit queries (..., heads, head_dim) times their learned scales."""
        return q * self.query_scales.view(-1, self.head_dim).to(q.dtype)

    @property
    def query_scales(self) -> Tensor:
        """What unit queries are multiplied by, (heads * head_dim,)."""
        return (wide(self.query_scale) * self._factors.query).square()

    @property
    def gate_scales(self) -> Tensor:
        """What the output gate's logits are multiplied by, (heads * head_dim,)."""
        return (wide(self.gate_scale) * self._factors.gate).square()

    @property
    def _factors(self) -> UnitScales:
        assert self.scales is not None
        return self.scales

    @property
    def gate_size(self) -> int:
        """Rows of the output gate in `qkv_proj`, the first ones."""
        return self.num_gate_heads * self.head_dim

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """Attention's output (..., heads * head_dim) times its gate; of unit length with scales."""
        if not self.scales:
            return out * torch.sigmoid(gate)
        normed: Tensor = self.unit(out * torch.sigmoid(gate * self.gate_scales.to(gate.dtype)))
        return normed

    def first_loop_share(self, q: Tensor) -> Tensor:
        """How much each head of a rotated q (..., heads, head_dim) takes of the first loop's K/V, 0..1.

        (..., heads, 1), in q's dtype; only for a model with `first_loop_gate`.
        """
        return self.gate_activation((q * self.gate_weight).sum(-1) + self.gate_bias)[..., None]

    def _normalised(self, qkv: Tensor) -> Tensor:
        split = self.num_heads * self.head_dim
        q, k = qkv[..., :split], qkv[..., split : split + self.num_kv_heads * self.head_dim]
        qk = torch.cat((self.q_norm(q), self.k_norm(k)), -1)
        return qk.view(*qk.shape[:-1], -1, self.head_dim)


class GatedMLP(nn.Module):
    """down(act(gate x) * up x), gate and up in one product (Shazeer 2020)."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        c = config
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.activation = ACTIVATIONS[c.activation]
        self.scales = c.unit_scales
        if c.unit_scales:
            self.unit = UnitNorm(c.norm_eps)
            self.gate_up_scale = nn.Parameter(torch.ones(2 * c.intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of x (..., hidden); same shape out."""
        both = self.gate_up_proj(x)
        if self.scales:
            both = both * self.gate_up_scales.to(both.dtype)
        gate, up = both.chunk(2, -1)
        inner = self.activation(gate) * up
        out: Tensor = self.down_proj(self.unit(inner) if self.scales else inner)
        return out

    @property
    def gate_up_scales(self) -> Tensor:
        """What gates and ups are multiplied by, (2 * intermediate_size,)."""
        assert self.scales is not None
        return wide(self.gate_up_scale) * self.scales.mlp


class PlainMLP(nn.Module):
    """down(act(up x))."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        c = config
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of x (..., hidden); same shape out."""
        out: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return out


class SourceAttention(nn.Module):
    """A decoder layer's attention over what an encoder made of a source.

    It knows no positions, and its K and V are the same in every loop: they are made once.
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        c, width = config, config.num_heads * config.head_dim
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=False)

    def keys_and_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of encoded sources (..., hidden), each (..., heads, head_dim)."""
        return self._heads(self.k_proj(encoded)), self._heads(self.v_proj(encoded))

    def forward(self, cache: int, x: Tensor, attend: Attend) -> Tensor:
        """Attention of x (..., hidden) over the K and V with this index (`LoopedConfig.source_caches`)."""
        q = self._heads(self.q_proj(x))
        nothing = q[..., :0, :]  # is written
        projected: Tensor = self.o_proj(attend(cache, q, nothing, nothing).flatten(-2))
        return projected

    def _heads(self, product: Tensor) -> Tensor:
        return product.view(*product.shape[:-1], -1, self.head_dim)


class Layer(nn.Module):
    """One transformer layer; `NormPlacement` decides which of the norms are real.

    With `reads_source` it attends over a source between text and MLP.
    """

    def __init__(self, config: LoopedConfig, rotary: Rotary, *, reads_source: bool = False) -> None:
        super().__init__()
        place = config.norm_placement

        def norm(*placements: NormPlacement) -> nn.Module:
            return make_norm(config) if place in placements else nn.Identity()

        before = (NormPlacement.PRE, NormPlacement.SANDWICH, NormPlacement.POST_ADD)
        after = (NormPlacement.SANDWICH, NormPlacement.OUTPUT)
        self.attn_norm, self.mlp_norm = norm(*before), norm(*before)
        self.attn_out_norm, self.mlp_out_norm = norm(*after), norm(*after)
        self.attn_sum_norm, self.mlp_sum_norm = norm(NormPlacement.POST_ADD), norm(NormPlacement.POST_ADD)
        self.attn = Attention(config, rotary)
        self.mlp = GatedMLP(config) if config.gated_mlp else PlainMLP(config)
        self.first_source_cache = config.source_caches.start
        self.reads_source = reads_source
        if reads_source:
            self.source_norm, self.source_attn = make_norm(config), SourceAttention(config)

    def forward(self, layer: int, h: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """h (..., hidden) through attention and MLP; returns a new tensor of the same shape."""
        h = self.attn_sum_norm(h + self.attn_out_norm(self.attn(layer, self.attn_norm(h), angles, attend)))
        if self.reads_source:
            h = h + self.source_attn(self.first_source_cache + layer, self.source_norm(h), attend)
        out: Tensor = self.mlp_sum_norm(h + self.mlp_out_norm(self.mlp(self.mlp_norm(h))))
        return out


class InterpolatedLayer(nn.Module):
    """A layer whose states go a part of the way towards its normalised outputs, channel by channel."""

    def __init__(self, config: LoopedConfig, scales: UnitScales, rotary: Rotary) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.attn = Attention(config, rotary)
        self.mlp = GatedMLP(config)
        self.attn_rate = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp_rate = nn.Parameter(torch.ones(config.hidden_size))
        self.factor = scales.rate

    def forward(self, layer: int, h: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """h (..., hidden), of any length, through attention and MLP; a new tensor of the same shape."""
        h = self.norm(h)
        h = self.norm(self._step(h, self.attn(layer, h, angles, attend), self.attn_rate))
        return self._step(h, self.mlp(h), self.mlp_rate)

    def _step(self, h: Tensor, out: Tensor, rate: Tensor) -> Tensor:
        stepped: Tensor = h + self.rates(rate).to(h.dtype) * (self.norm(out) - h)
        return stepped

    def rates(self, rate: Tensor) -> Tensor:
        """How far a step goes, (hidden,), by one of the two learned rates."""
        return (wide(rate) * self.factor).abs()


def make_layer(config: LoopedConfig, rotary: Rotary) -> nn.Module:
    """A layer of the model's kind; raises ConfigError for states that interpolate without scales."""
    if config.norm_placement is not NormPlacement.INTERPOLATION:
        return Layer(config, rotary, reads_source=config.encoder is not None)
    if config.unit_scales is None:
        raise ConfigError("norm_placement is interpolation; it needs unit_scales")
    return InterpolatedLayer(config, config.unit_scales, rotary)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, prefix: int = 0) -> Tensor:
    """Causal attention over whole sequences: q (batch, tokens, heads, head_dim), grouped k and v.

    With a `window` a token sees so many tokens, itself and those before it. The first `prefix` tokens see
    one another both ways.
    """
    if window is None and prefix == 0 and q.requires_grad and q.device.type == "cpu":
        return _trained_attention(q, k, v)
    is_plain = window is None and not prefix
    return masked_attention(q, k, v, None if is_plain else seen_tokens(q.shape[-3], window, prefix, q.device))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of q (batch, tokens, heads, head_dim) over grouped k and v (batch, keys, groups, head_dim).

    `seen` (tokens, keys) says which key a token sees; None: itself and those before it.
    """
    grouped = q.shape[-2] != k.shape[-2]
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, enable_gqa=grouped)
    return out.transpose(-2, -3)


def scored_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Attention of q (batch, tokens, heads, head_dim) over k and v (batch, seen, heads, head_dim).

    `bias` (broadcast to batch, heads, tokens, seen) is added to the scores, -inf hides one; `scale` is their
    factor, 1 / sqrt(head_dim) for None. While training on a CPU it is spelt out, which is faster backwards.
    """
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    if not (q.requires_grad and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(-2, -3)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    shares = (scores if bias is None else scores + bias).float().softmax(-1).to(v.dtype)
    return (shares @ v).transpose(-2, -3)


def _trained_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention spelt out, shapes as above, for training on a CPU.

    torch's fused one takes nine times as long backwards (bf16, 58 sequences of 66 tokens, two AMX cores:
    82 ms against 9).
    """
    batch, tokens, heads, size = q.shape
    groups, shared = k.shape[-2], heads // k.shape[-2]
    q = q.view(batch, tokens, groups, shared, size).permute(0, 2, 3, 1, 4).reshape(-1, shared * tokens, size)
    k, v = (x.transpose(1, 2).reshape(batch * groups, tokens, size) for x in (k, v))
    later = torch.full((tokens, tokens), -torch.inf, device=q.device).triu_(1)
    scores = torch.bmm(q, k.transpose(1, 2)).view(-1, shared, tokens, tokens).float() * size**-0.5 + later
    shares = scores.softmax(-1).to(v.dtype).view(-1, shared * tokens, tokens)
    out = torch.bmm(shares, v).view(batch, groups, shared, tokens, size)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads, size)


def seen_tokens(tokens: int, window: int | None, prefix: int, device: torch.device) -> Tensor:
    """(tokens, tokens): whether the row's token sees the column's."""
    everything = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    seen = everything.tril() if window is None else everything.tril() & everything.triu(1 - window)
    seen[:prefix, :prefix] = True
    return seen
