"""Nanbeige 4.2: Llama's layers, the whole stack run `num_loops` times.

Knows nothing about tensors. Follows the vendor's NanbeigeConfig. It is also the layout in which our own
models are written (`write_config`). Invariant: the options of that class that are not plain looping
(n-gram embeddings, hyper-connections, split loops, shared K/V, depth attention) are refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.checkpoint.families.family import Family, Fields, Layout, write_token_ids
from model.checkpoint.families.llama import BIASES, LAYER_WEIGHTS, PRE_NORMS, read_shape, refuse_windows
from model.checkpoint.families.rope import write_rope
from model.network.config import LoopedConfig

_REFUSED = (
    "qk_layernorm",
    "emb_neighbor_num",
    "insert_ngram_layer_idx",
    "ngram_insert_all_layers",
    "enable_double_loop_split",
    "loop_middle_layers",
    "loop_share_kv",
    "enable_hyper_connection",
    "enable_mhc",
    "enable_h_res_identity",
    "enable_depth_attention",
)


def read_config(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of a Nanbeige config.json; raises ConfigError naming the field."""
    fields = Fields(raw)
    fields.refuse(*_REFUSED)
    refuse_windows(fields)
    shape = read_shape(fields, "nanbeige")
    if fields.integer("pretraining_tp", 1) > 1 and (shape.qkv_bias or shape.mlp_bias):
        raise fields.wrong("pretraining_tp", "above 1 the reference drops the biases that this config has")
    return replace(
        shape,
        num_loops=_num_loops(fields),
        norm_after_loop=not fields.flag("skip_loop_final_norm", False),
    )


def _num_loops(fields: Fields) -> int:
    """loop_loss_weights holds one weight for every loop but the last, and wins over num_loops."""
    weights = fields.items("loop_loss_weights")
    return len(weights) + 1 if weights else fields.integer("num_loops", 1)


def write_config(config: LoopedConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back as this config; ValueError where it can't hold it."""
    raw = {**_fixed_fields(), **_shape_fields(config)}
    if read_config(raw) != replace(config, family="nanbeige"):
        raise ValueError(f"a {config.family} model does not fit the nanbeige layout: {config}")
    return raw


def _fixed_fields() -> dict[str, Any]:
    return {
        "architectures": list(FAMILY.architectures),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "loop_loss_weights": [],
        "model_type": FAMILY.model_type,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "use_cache": True,
    }


def _shape_fields(config: LoopedConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": write_token_ids(config.eos_token_ids),
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_block_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_loops": config.num_loops,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": write_rope(config.rope),
        "rope_theta": config.rope.theta,
        "skip_loop_final_norm": not config.norm_after_loop,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }


FAMILY = Family(
    name="nanbeige",
    model_type="nanbeige",
    architectures=("NanbeigeForCausalLM",),
    read_config=read_config,
    weights={**LAYER_WEIGHTS, **BIASES, **PRE_NORMS},
    layout=Layout(lambda config: not (config.input_injection or config.encoder), write_config),
)
