"""A LoopedTransformer's weights in the library's layout, and the structure that describes them.

Alone knows both sides. Invariant: `PackedModel` keeps alive all memory that its structure points to.
"""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.network.config import InitialState, LoopedConfig, NormPlacement
from model.network.int8 import ADAPTER, Int8Linear
from model.network.layers import GatedMLP, InterpolatedLayer, Layer, PlainNorm, RMSNorm, Rotary
from model.network.looped import LoopedTransformer
from model.network.relative import RelativeScores
from model.passes.native import structs
from model.passes.native.library import NativeUnavailableError
from model.passes.native.structs import BLOCK, MOST_INPUTS, PAGE, SourceType, WeightType

ACTIVATIONS = {  # as in src/vec.h
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_fast": 2,
    "gelu_pytorch_tanh": 2,
    "quick_gelu": 3,
    "relu": 4,
    "relu2": 5,
    "mish": 6,
}
PLACEMENTS = {
    NormPlacement.PRE: 0,
    NormPlacement.SANDWICH: 1,
    NormPlacement.POST_ADD: 2,
    NormPlacement.OUTPUT: 3,
    NormPlacement.INTERPOLATION: 4,
}
STARTS = {InitialState.NOISE: 0, InitialState.INPUT: 1, InitialState.INPUT_ALONE: 2}
_SOURCES = {
    torch.float32: SourceType.FP32,
    torch.bfloat16: SourceType.BF16,
    torch.float16: SourceType.FP16,
    torch.int8: SourceType.INT8,
}
_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class _Job(NamedTuple):
    """A matrix on its way: the module that holds it, where its description goes, and how it is cut up."""

    linear: nn.Linear | Int8Linear
    place: structs.Matrix
    type: WeightType
    row_map: NDArray[np.int32]  # packed output -> source row, or -1


class PackedModel:
    """The structure `description`, and the memory behind it; `weight_bytes` of packed matrices."""

    def __init__(
        self,
        library: ctypes.CDLL,
        model: LoopedTransformer,
        max_positions: int,
        *,
        int4: bool = False,
        frees: bool = False,
    ) -> None:
        """Packs a model on the CPU. Its own weights are left as they are, until `release`; or else each
        matrix is freed as soon as it is packed, so that the model never takes twice its memory.

        Raises NativeUnavailableError, with the size or the kind that isn't covered.
        """
        self.config = model.config
        check_covered(model.config, model.device)
        self._kept: list[object] = []
        self._modules = _layers(model)
        self._layers = (structs.Layer * len(self._modules))()
        self.description = structs.Model(layers=self._layers, **_sizes(model.config, max_positions))
        jobs = list(self._jobs(model, int4))
        sizes = [_packed_bytes(library, job) for job in jobs]
        self.weight_bytes = sum(sizes)
        arena = allocate(sum(_aligned(size) for size in sizes), huge=True)
        self._kept.append(arena)
        start = 0
        for job, size in zip(jobs, sizes, strict=True):
            self._pack(library, job, arena[start : start + size])
            start += _aligned(size)
            if frees:
                _free(job.linear, model)
        self._describe_layers()
        self._describe_ends(model, max_positions)

    def _jobs(self, model: LoopedTransformer, int4: bool) -> Iterator[_Job]:
        config = model.config
        for packed, layer in zip(self._layers, self._modules, strict=True):
            qkv = layer.attn.qkv_proj
            yield _Job(qkv, packed.qkv, _type(qkv, int4), _gate_last(qkv.out_features, layer.attn.gate_size))
            places = [(packed.o, layer.attn.o_proj), (packed.down, layer.mlp.down_proj)]
            if isinstance(layer.mlp, GatedMLP):
                gate_up = layer.mlp.gate_up_proj
                yield _Job(gate_up, packed.gate_up, _type(gate_up, int4), _in_turn(config.intermediate_size))
            else:
                places.append((packed.gate_up, layer.mlp.up_proj))
            if isinstance(layer, Layer) and layer.reads_source:
                source = layer.source_attn
                places += [(packed.source_q, source.q_proj), (packed.source_o, source.o_proj)]
                places += [(packed.source_k, source.k_proj), (packed.source_v, source.v_proj)]
            for place, linear in places:
                yield _Job(linear, place, _type(linear, int4), _in_order(linear.out_features))
        yield _Job(model.head, self.description.head, _type(model.head, int4), _in_order(config.vocab_size))
        if config.input_injection:
            adapter = getattr(model, ADAPTER)  # it stays as it is: see `quantize_linears`
            yield _Job(
                adapter, self.description.adapter, _type(adapter, False), _in_order(config.hidden_size)
            )

    def _pack(self, library: ctypes.CDLL, job: _Job, memory: Bytes) -> None:
        linear, blocks = job.linear, len(job.row_map) // BLOCK
        weight = linear.weight.detach().contiguous()
        scales = np.zeros(len(job.row_map), np.float32) if job.type == WeightType.INT8 else None
        source_scales = linear.scales.float().contiguous() if isinstance(linear, Int8Linear) else None
        work = structs.PackJob(
            type=job.type,
            source_type=_SOURCES[weight.dtype],
            inputs=linear.in_features,
            blocks=blocks,
            source=weight.data_ptr(),
            source_scales=None if source_scales is None else source_scales.data_ptr(),
            row_map=job.row_map.ctypes.data,
            data=memory.ctypes.data,
            scales=self._address(scales),
        )
        if library.speed_pack(work):
            raise NativeUnavailableError(f"a matrix of {linear.in_features} inputs cannot be packed")
        job.place.type, job.place.inputs, job.place.blocks = job.type, linear.in_features, blocks
        job.place.data, job.place.scales = memory.ctypes.data, self._address(scales)
        if linear.bias is not None:
            mapped = np.where(job.row_map < 0, 0, _floats(linear.bias)[job.row_map])
            job.place.bias = self._address(mapped.astype(np.float32))

    def _describe_layers(self) -> None:
        for index, (packed, layer) in enumerate(zip(self._layers, self._modules, strict=True)):
            packed.windowed = self.config.is_windowed(index)
            packed.second_rope = index in self.config.second_rope_layers
            if isinstance(layer, InterpolatedLayer):
                self._describe_scales(packed, layer)
                continue
            for name in (field[0] for field in structs.Layer._fields_):
                if name.endswith("_norm") and not name.startswith(("q_", "k_")):
                    setattr(packed, name, self._norm(getattr(layer, name, None)))
            attention = layer.attn
            if attention.has_qk_norm:
                packed.q_norm = self._address(_floats(attention.q_norm.weight))
                packed.k_norm = self._address(_floats(attention.k_norm.weight))
            if attention.has_qk_bias:
                packed.qk_bias = self._address(_floats(attention.qk_bias))
            if self.config.first_loop_gate:
                packed.loop_gate_weight = self._address(_floats(attention.gate_weight))
                packed.loop_gate_bias = self._address(_floats(attention.gate_bias))

    def _describe_scales(self, packed: structs.Layer, layer: InterpolatedLayer) -> None:
        """Scales as they are multiplied; those of the MLP in whole blocks."""
        packed.query_scale = self._address(_floats(layer.attn.query_scales))
        packed.gate_scale = self._address(_floats(layer.attn.gate_scales))
        gate, up = layer.mlp.gate_up_scales.chunk(2)
        packed.mlp_gate_scale = self._address(_in_blocks(gate))
        packed.mlp_up_scale = self._address(_in_blocks(up))
        packed.attn_rate = self._address(_floats(layer.rates(layer.attn_rate)))
        packed.mlp_rate = self._address(_floats(layer.rates(layer.mlp_rate)))

    def _describe_ends(self, model: LoopedTransformer, max_positions: int) -> None:
        """Embedding, final norm and rotary tables."""
        description, embedding = self.description, model.embedding.weight.detach()
        self._kept.append(embedding)
        description.embedding = embedding.data_ptr()
        description.embedding_type = _SOURCES[embedding.dtype]
        description.norm = self._norm(model.norm)
        scale = self.config.head_scale  # of the head's input, so of all logits
        if self.config.unit_scales:
            description.logit_scale = self._address(_in_blocks(model.logit_scales * scale))
        elif scale != 1.0:
            description.logit_scale = self._address(_in_blocks(torch.full((self.config.vocab_size,), scale)))
        if self.config.low_cycles:
            description.low_state = self._address(_floats(model.low_state))
        if self.config.encoder is not None:
            self._describe_encoder(model)
            return
        description.cos, description.sin = self._tables(model.rotary, max_positions)
        if model.second_rotary is not None:
            tables = self._tables(model.second_rotary, max_positions)
            description.second_cos, description.second_sin = tables

    def _describe_encoder(self, model: LoopedTransformer) -> None:
        """Its last norm, and the biases of both sides' scores, which stand in place of rotary tables."""
        self.description.encoder_norm = self._norm(model.encoder.norm)
        self.description.text_bias = self._biases(model.relative)
        self.description.source_bias = self._biases(model.encoder.relative)

    def _biases(self, relative: RelativeScores) -> int | None:
        """What is added to each head's scores, by how far a key stands ahead: a page more on both ends."""
        furthest = self.description.bias_distance + PAGE - 1
        return self._address(_floats(relative(torch.arange(-furthest, furthest + 1)).t()))

    def _norm(self, norm: nn.Module | None) -> int | None:
        """The address of a norm's weight: ones where it has none, nothing where it is of another kind."""
        if isinstance(norm, PlainNorm):
            return self._address(np.ones(self.config.hidden_size, np.float32))
        return self._address(_floats(norm.weight)) if isinstance(norm, RMSNorm) else None

    def _tables(self, rotary: Rotary, max_positions: int) -> tuple[int | None, int | None]:
        cos, sin = rotary(torch.arange(max_positions), torch.float32)
        half = self.config.rotary_dim // 2
        if self.config.rope.interleaved:
            cos, sin = cos[:, 0, 0::2], sin[:, 0, 1::2]
        else:
            cos, sin = cos[:, 0, :half], sin[:, 0, half:]
        return self._address(_floats(cos)), self._address(_floats(sin))

    def _address(self, numbers: Floats | None) -> int | None:
        if numbers is None:
            return None
        self._kept.append(numbers)
        return numbers.ctypes.data


def check_covered(config: LoopedConfig, device: torch.device) -> None:
    """Raises NativeUnavailableError for a model that the library can't run there, with the reason."""
    if device.type != "cpu":
        raise NativeUnavailableError(f"the device is {device}, not the CPU")
    if config.head_dim % 2:
        raise NativeUnavailableError(f"head_dim is {config.head_dim}; an even one is needed")
    widest = max(2 * config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    if widest > MOST_INPUTS:
        raise NativeUnavailableError(f"a matrix has {widest} inputs; {MOST_INPUTS} are the most")


def release(model: LoopedTransformer) -> None:
    """Frees the matrices of a model that is packed; it can compute nothing any more.

    The embedding stays, which the library reads in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | Int8Linear):
            _free(module, model)


def _free(linear: nn.Linear | Int8Linear, model: LoopedTransformer) -> None:
    """Frees a matrix that is packed, unless it is the embedding as well."""
    if linear.weight.data_ptr() != model.embedding.weight.data_ptr():
        empty = linear.weight.detach().new_empty(0)
        linear.weight = nn.Parameter(empty, False) if isinstance(linear, nn.Linear) else empty


def allocate(size: int, *, huge: bool = False) -> Bytes:
    """Zeroed memory that is mapped where it is first touched; with `huge` in pages of 2 MB."""
    memory = mmap.mmap(-1, max(size, 1) + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # another system, or a kernel without such pages
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    first = -whole.ctypes.data % _HUGE_PAGE
    return whole[first : first + size]


def _packed_bytes(library: ctypes.CDLL, job: _Job) -> int:
    return int(library.speed_block_bytes(job.type, job.linear.in_features)) * (len(job.row_map) // BLOCK)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _layers(model: LoopedTransformer) -> list[Layer | InterpolatedLayer]:
    """The layers of the text, and those of the encoder behind them."""
    found = [*model.layers, *(model.encoder.layers if model.config.encoder else ())]
    layers = [layer for layer in found if isinstance(layer, Layer | InterpolatedLayer)]
    assert len(layers) == len(found)
    return layers


def _type(linear: nn.Linear | Int8Linear, int4: bool) -> WeightType:
    if int4:
        return WeightType.INT4
    if isinstance(linear, Int8Linear):
        return WeightType.INT8
    return WeightType.BF16 if linear.weight.dtype == torch.bfloat16 else WeightType.FP32  # holds fp16 exactly


def _in_order(count: int) -> NDArray[np.int32]:
    """Rows 0..count - 1 in blocks of 16, the last one filled up."""
    rows = np.full(-(-count // BLOCK) * BLOCK, -1, np.int32)
    rows[:count] = np.arange(count)
    return rows


def _gate_last(count: int, gate: int) -> NDArray[np.int32]:
    """Rows in order, but for the first `gate` ones, which stand at the end."""
    rows = _in_order(count)
    rows[:count] = np.roll(rows[:count], -gate)
    return rows


def _in_blocks(numbers: Tensor) -> Floats:
    """In fp32, filled up with zeros to a whole number of blocks."""
    padded = np.zeros(-(-len(numbers) // BLOCK) * BLOCK, np.float32)
    padded[: len(numbers)] = _floats(numbers)
    return padded


def _in_turn(count: int) -> NDArray[np.int32]:
    """Blocks of `count` gates and of the `count` ups behind them in turn."""
    gates = _in_order(count)
    ups = np.where(gates < 0, -1, gates + count)
    return np.stack((gates.reshape(-1, BLOCK), ups.reshape(-1, BLOCK)), 1).astype(np.int32).ravel()


def _floats(tensor: Tensor) -> Floats:
    """A copy in fp32."""
    return np.array(tensor.detach().float().contiguous().numpy(), copy=True)


def _sizes(config: LoopedConfig, max_positions: int) -> dict[str, int | float]:
    same = (
        "vocab_size hidden_size intermediate_size num_heads num_kv_heads head_dim rotary_dim "
        "num_prelude_layers num_block_layers num_coda_layers norm_after_loop norm_before_coda "
        "input_injection first_loop_gate norm_eps embedding_scale output_gate input_addition "
        "norm_after_prelude low_cycles"
    )
    bias, encoder, scale = config.relative_bias, config.encoder, config.attention_scale
    return {
        **{name: getattr(config, name) for name in same.split()},
        "max_positions": max_positions,
        "num_loops": config.most_loops,
        "placement": PLACEMENTS[config.norm_placement],
        "start": STARTS[config.initial_state],
        "activation": ACTIVATIONS[config.activation],
        "interleaved": config.rope.interleaved,
        "window": config.sliding_window or 0,
        "num_encoder_layers": 0 if encoder is None else encoder.num_layers,
        "plain_mlp": not config.gated_mlp,
        "bias_distance": 0 if bias is None else min(bias.max_distance, max_positions),
        "attention_scale": config.head_dim**-0.5 if scale is None else scale,
    }
