"""A LoopedTransformer's weights as the kernels read them, and which models the kernels cover.

Nothing is copied: matrices and norms are the model's own tensors. Invariant: a model that `check_covered`
lets pass needs nothing else than what `Weights` holds.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.network.config import LoopedConfig, NormKind, NormPlacement
from model.network.int8 import Int8Linear
from model.network.layers import GatedMLP, Layer, RMSNorm
from model.network.looped import LoopedTransformer

SILU = ("silu", "swish")


class CudaUnavailableError(RuntimeError):
    """The kernels can't run a model here; the message says why."""


class Matrix(NamedTuple):
    """A linear layer: weight (outputs, inputs), fp32 scales (outputs,) of int8 weights, biases (outputs,)."""

    weight: Tensor
    scales: Tensor | None
    biases: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module) -> "Matrix":
        """The tensors of a linear layer, which must lie row by row."""
        assert isinstance(linear, nn.Linear | Int8Linear)
        scales = linear.scales if isinstance(linear, Int8Linear) else None
        assert linear.weight.is_contiguous()
        return cls(linear.weight.detach(), scales, None if linear.bias is None else linear.bias.detach())

    @property
    def num_outputs(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def num_inputs(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]


class LayerWeights(NamedTuple):
    """One layer; a norm is the weight of an RMSNorm, None where the layer has none there."""

    attn_norm: Tensor | None
    qkv: Matrix
    qk_bias: Tensor | None  # (heads + kv_heads, head_dim)
    o: Matrix
    attn_out_norm: Tensor | None
    attn_sum_norm: Tensor | None
    mlp_norm: Tensor | None
    gate_up: Matrix
    down: Matrix
    mlp_out_norm: Tensor | None
    mlp_sum_norm: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module) -> "LayerWeights":
        """The weights of a layer of a covered model."""
        assert isinstance(layer, Layer)
        assert isinstance(layer.mlp, GatedMLP)
        return cls(
            attn_norm=_norm(layer.attn_norm),
            qkv=Matrix.of(layer.attn.qkv_proj),
            qk_bias=layer.attn.qk_bias.detach() if layer.attn.has_qk_bias else None,
            o=Matrix.of(layer.attn.o_proj),
            attn_out_norm=_norm(layer.attn_out_norm),
            attn_sum_norm=_norm(layer.attn_sum_norm),
            mlp_norm=_norm(layer.mlp_norm),
            gate_up=Matrix.of(layer.mlp.gate_up_proj),
            down=Matrix.of(layer.mlp.down_proj),
            mlp_out_norm=_norm(layer.mlp_out_norm),
            mlp_sum_norm=_norm(layer.mlp_sum_norm),
        )


class Weights(NamedTuple):
    """All of a model, and cos and sin of all positions (positions, rotary_dim), fp32, signs folded in."""

    embedding: Tensor
    layers: list[LayerWeights]
    adapter: Matrix | None
    norm: Tensor
    head: Matrix
    cosines: Tensor
    sines: Tensor

    @classmethod
    def of(cls, model: LoopedTransformer, max_positions: int) -> "Weights":
        """The weights of a covered model, for positions below `max_positions`."""
        positions = torch.arange(max_positions, device=model.device)
        cosines, sines = model.rotary(positions, torch.float32)
        norm = _norm(model.norm)
        assert norm is not None
        return cls(
            embedding=model.embedding.weight.detach(),
            layers=[LayerWeights.of(layer) for layer in model.layers],
            adapter=Matrix.of(model.adapter) if model.config.input_injection else None,
            norm=norm,
            head=Matrix.of(model.head),
            cosines=cosines.flatten(1).contiguous(),
            sines=sines.flatten(1).contiguous(),
        )


def _norm(module: nn.Module) -> Tensor | None:
    return module.weight.detach() if isinstance(module, RMSNorm) else None


def check_covered(config: LoopedConfig) -> None:
    """Raises CudaUnavailableError for a model that the kernels can't run, with the reason."""
    if config.norm_kind is not NormKind.RMS:
        raise CudaUnavailableError(f"its norms are of the kind {config.norm_kind.value}; rms is covered")
    if config.norm_placement is NormPlacement.INTERPOLATION:
        raise CudaUnavailableError("its states interpolate between norms")
    if config.activation not in SILU or not config.gated_mlp:
        raise CudaUnavailableError(f"its MLP is not a gated silu: activation {config.activation}")
    for name in UNCOVERED:
        if getattr(config, name):
            raise CudaUnavailableError(f"it has {name}, which no kernel computes")


UNCOVERED = (
    "encoder",
    "relative_bias",
    "first_loop_gate",
    "unit_scales",
    "low_cycles",
    "prefix_lm",
    "output_gate",
    "qk_norm",
    "second_rope",
    "input_addition",
    "norm_after_prelude",
)
