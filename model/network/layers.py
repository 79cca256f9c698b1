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

from model.network.config import ConfigError, LoopedConfig, NormPlacement, RopeConfig

# (layer index, q, k, v) -> attention output; q, k, v are (..., heads, head_dim), q already rotated.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


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

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.rope = config.rope
        self.rotary_dim = config.rotary_dim
        self.max_positions = config.max_positions
        self.interleaved = config.rope.interleaved
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
        width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.qkv_proj = nn.Linear(c.hidden_size, width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.output_bias)
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

    def forward(self, layer: int, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Attention of x (..., hidden) for the layer with this index; same shape out."""
        qkv = self.qkv_proj(x)
        heads = qkv.view(*qkv.shape[:-1], -1, self.head_dim)  # (..., heads + 2 kv_heads, head_dim)
        rotated = self.num_heads + self.num_kv_heads
        qk, v = heads[..., :rotated, :], heads[..., rotated:, :]
        if self.has_qk_norm:
            qk = self._normalised(qkv)
        if self.has_qk_bias:
            qk = qk + self.qk_bias
        qk = self.rotary[0].rotate(qk, *angles)
        out = attend(layer, qk[..., : self.num_heads, :], qk[..., self.num_heads :, :], v)
        projected: Tensor = self.o_proj(out.flatten(-2))
        return projected

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

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of x (..., hidden); same shape out."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        out: Tensor = self.down_proj(self.activation(gate) * up)
        return out


class Layer(nn.Module):
    """One transformer layer; `NormPlacement` decides which of the norms are real."""

    def __init__(self, config: LoopedConfig, rotary: Rotary) -> None:
        super().__init__()
        place = config.norm_placement

        def norm(*placements: NormPlacement) -> nn.Module:
            real = place in placements
            return RMSNorm(config.hidden_size, config.norm_eps) if real else nn.Identity()

        before = (NormPlacement.PRE, NormPlacement.SANDWICH, NormPlacement.POST_ADD)
        after = (NormPlacement.SANDWICH, NormPlacement.OUTPUT)
        self.attn_norm, self.mlp_norm = norm(*before), norm(*before)
        self.attn_out_norm, self.mlp_out_norm = norm(*after), norm(*after)
        self.attn_sum_norm, self.mlp_sum_norm = norm(NormPlacement.POST_ADD), norm(NormPlacement.POST_ADD)
        self.attn = Attention(config, rotary)
        self.mlp = GatedMLP(config)

    def forward(self, layer: int, h: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """h (..., hidden) through attention and MLP; returns a new tensor of the same shape."""
        h = self.attn_sum_norm(h + self.attn_out_norm(self.attn(layer, self.attn_norm(h), angles, attend)))
        out: Tensor = self.mlp_sum_norm(h + self.mlp_out_norm(self.mlp(self.mlp_norm(h))))
        return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention over whole sequences: q (batch, tokens, heads, head_dim), grouped k and v.

    With a `window` a token sees so many tokens, itself and those before it.
    """
    if window is None and q.requires_grad and q.device.type == "cpu":
        return _trained_attention(q, k, v)
    grouped = q.shape[-2] != k.shape[-2]
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    mask = None if window is None else _band(q.shape[-2], window, q.device)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(-2, -3)


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


def _band(tokens: int, window: int, device: torch.device) -> Tensor:
    """(tokens, tokens): whether the row's token sees the column's."""
    everything = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return everything.tril() & everything.triu(1 - window)
