"""A looped model as a GGUF file, for llama.cpp: Nanbeige's layout, the one looped model that it runs.

Follows llama.cpp's model `nanbeige` (src/models/nanbeige.cpp) and the names of the package `gguf`. llama.cpp
rotates neighbouring channels where the checkpoint rotates halves, so rows of q and k change places.
Invariant: what is written gives llama.cpp the same logits but for rounding; what would not is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.checkpoint.families import nanbeige
from model.checkpoint.loader import load_model
from model.checkpoint.tokenizer import tokenizer_file
from model.network.config import LoopedConfig
from model.network.looped import LoopedTransformer

if TYPE_CHECKING:
    import gguf

MatrixType = Literal["f32", "f16", "bf16", "q8_0"]
MATRIX_TYPES: tuple[MatrixType, ...] = get_args(MatrixType)
ARCHITECTURE = "nanbeige"
Q8_GROUP = 32  # inputs that share a scale
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens in a GGUF file

Floats = NDArray[np.float32]


class ExportError(ValueError):
    """A model that a GGUF file can't hold, or that llama.cpp would run in another way."""


def write_gguf(folder: Path, target: Path, matrix_type: MatrixType = "q8_0") -> int:
    """Writes the checkpoint of `folder` to `target`, matrices as `matrix_type`; the file's size in bytes.

    Raises ExportError, CheckpointError, OSError, and ImportError without the package `gguf`.
    """
    import gguf  # noqa: PLC0415, an extra

    loaded = load_model(folder, "cpu", "float32")
    check(loaded.config, matrix_type)
    tokens = vocabulary(folder, loaded.config)
    kind = gguf.GGMLQuantizationType[matrix_type.upper()]
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    try:
        _write_sizes(writer, folder, loaded.config)
        _write_vocabulary(writer, tokens, loaded.config)
        total = 3 + 9 * loaded.config.num_layers
        for name, values in tqdm(tensors(loaded.model), total=total, desc=target.name, disable=None):
            if values.ndim < 2:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return target.stat().st_size


def check(config: LoopedConfig, matrix_type: MatrixType = "f32") -> None:
    """Raises ExportError, with the reason, for a model that llama.cpp would not run as it is."""
    try:
        nanbeige.write_config(config)
    except ValueError:
        raise ExportError(
            f"llama.cpp runs looped models of Nanbeige's layout alone; this is {config.family}"
        ) from None
    if config.qkv_bias or config.mlp_bias:
        raise ExportError("attention_bias or mlp_bias is true; llama.cpp's nanbeige has no biases")
    if config.activation not in ("silu", "swish"):
        raise ExportError(f"hidden_act is {config.activation!r}; llama.cpp's nanbeige has silu alone")
    if config.rope.kind != "default":
        raise ExportError(f"rope_scaling is {config.rope.kind!r}; only the plain embedding is exported")
    for name in ("hidden_size", "intermediate_size"):
        if matrix_type == "q8_0" and getattr(config, name) % Q8_GROUP:
            raise ExportError(f"{name} is {getattr(config, name)}; q8_0 needs a multiple of {Q8_GROUP}")


def tensors(model: LoopedTransformer) -> Iterator[tuple[str, Floats]]:
    """All tensors by llama.cpp's names, (out, in) and fp32; a tied head is left out."""
    config = model.config

    def weight(name: str) -> Floats:
        values: Floats = model.get_parameter(f"{name}.weight").detach().float().numpy()
        return values

    yield "token_embd.weight", weight("embedding")
    yield "output_norm.weight", weight("norm")
    if not config.tie_embeddings:
        yield "output.weight", weight("head")
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        qkv, gate_up = weight(f"{layer}.attn.qkv_proj"), weight(f"{layer}.mlp.gate_up_proj")
        parts = {
            "attn_norm": weight(f"{layer}.attn_norm"),
            "attn_q": interleaved(qkv[:q], config.head_dim),
            "attn_k": interleaved(qkv[q : q + kv], config.head_dim),
            "attn_v": qkv[q + kv :],
            "attn_output": weight(f"{layer}.attn.o_proj"),
            "ffn_norm": weight(f"{layer}.mlp_norm"),
            "ffn_gate": gate_up[: config.intermediate_size],
            "ffn_up": gate_up[config.intermediate_size :],
            "ffn_down": weight(f"{layer}.mlp.down_proj"),
        }
        yield from ((f"blk.{index}.{name}.weight", values) for name, values in parts.items())


def interleaved(weight: Floats, head_dim: int) -> Floats:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, ...: halves become neighbours."""
    heads = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(weight.shape)


class Vocabulary:
    """What a tokenizer.json of byte-level BPE says, as a GGUF file has it."""

    def __init__(self, raw: dict[str, Any], size: int) -> None:
        """`size` is the model's number of tokens. Raises ExportError for another kind of tokenizer."""
        if raw["model"].get("type") != "BPE" or "ByteLevel" not in json.dumps(raw.get("pre_tokenizer")):
            raise ExportError("the tokenizer is not a byte-level BPE, the only kind that is exported")
        self.tokens = [f"[UNUSED_{i}]" for i in range(size)]
        self.kinds = [UNUSED] * size
        for token, index in raw["model"]["vocab"].items():
            if index >= size:
                raise ExportError(f"the tokenizer's token {index} is beyond the model's vocabulary of {size}")
            self.tokens[index], self.kinds[index] = token, NORMAL
        for added in raw.get("added_tokens", []):
            if added["id"] < size:
                self.tokens[added["id"]] = added["content"]
                self.kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        self.merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        splits_digits = '"Digits"' in json.dumps(raw["pre_tokenizer"])
        self.pre_tokenizer = "smollm" if splits_digits else "gpt-2"


def vocabulary(folder: Path, config: LoopedConfig) -> Vocabulary:
    """The vocabulary of a checkpoint; raises ExportError where it has none or one that doesn't fit."""
    if (file := tokenizer_file(folder)) is None:
        raise ExportError(f"{folder} has no tokenizer, and llama.cpp loads no model without one")
    return Vocabulary(json.loads(file.read_text(encoding="utf-8")), config.vocab_size)


def _write_sizes(writer: "gguf.GGUFWriter", folder: Path, config: LoopedConfig) -> None:
    writer.add_name(folder.name)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_block_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_uint32(f"{ARCHITECTURE}.num_loops", config.num_loops)
    writer.add_bool(f"{ARCHITECTURE}.skip_loop_final_norm", not config.norm_after_loop)


def _write_vocabulary(writer: "gguf.GGUFWriter", vocabulary: Vocabulary, config: LoopedConfig) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(False)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
