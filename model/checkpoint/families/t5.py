"""T5, and T5 with a decoder whose layers run several times: the models of SPEED (arXiv 2310.12072).

Knows nothing about tensors. No checkpoint of that paper is public, so the looped format is this project's
own: T5's config and names, `model_type` t5_loop, and the key `num_decoder_loops`. A plain T5 (t5, t5-v1_1,
flan-t5) is the case of one loop. It is also the layout in which our own encoder-decoder models are written.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.checkpoint.families.family import (
    Family,
    Fields,
    Layout,
    Part,
    Place,
    Section,
    WeightTable,
    write_token_ids,
)
from model.network.config import ACTIVATIONS, EncoderConfig, LoopedConfig, RelativeBias

# Relative positions know no longest text; published models were trained on 512 tokens of source and serve
# sources of several times that. Source and text together, since they share the cache.
MAX_POSITIONS = 4096
PLAIN, LOOPED = "t5", "t5_loop"


def read_config(raw: Mapping[str, Any], family: str) -> LoopedConfig:
    """LoopedConfig of a config.json of this family; raises ConfigError naming the field."""
    fields = Fields(raw)
    if not fields.flag("is_encoder_decoder", True):
        raise fields.wrong("is_encoder_decoder", "an encoder alone writes no text")
    heads, hidden = fields.integer("num_heads"), fields.integer("d_model")
    activation, gated = _feed_forward(fields)
    tied = fields.flag("tie_word_embeddings", True)
    return LoopedConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("d_ff"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.integer("d_kv"),
        num_block_layers=fields.integer("num_decoder_layers", fields.integer("num_layers")),
        num_loops=_num_loops(fields, family),
        max_positions=MAX_POSITIONS,
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated_mlp=gated,
        attention_scale=1.0,
        head_scale=hidden**-0.5 if tied else 1.0,
        tie_embeddings=tied,
        encoder=EncoderConfig(fields.integer("num_layers"), _start_token(fields)),
        relative_bias=RelativeBias(
            fields.integer("relative_attention_num_buckets", 32),
            fields.integer("relative_attention_max_distance", 128),
        ),
        eos_token_ids=fields.token_ids("eos_token_id", 1),
    )


def _num_loops(fields: Fields, family: str) -> int:
    if family == LOOPED:
        return fields.integer("num_decoder_loops")
    if fields.integer("num_decoder_loops", 1) != 1:
        raise fields.wrong("num_decoder_loops", f"a decoder with loops is architecture {LOOPED_CLASS}")
    return 1


def _start_token(fields: Fields) -> int:
    """The text's first token; transformers takes the padding token where none is named."""
    key = "decoder_start_token_id" if fields.has("decoder_start_token_id") else "pad_token_id"
    found = fields.token_ids(key, None)
    if len(found) != 1:
        raise fields.wrong(key, "the one token that every text begins with is wanted")
    return found[0]


def _feed_forward(fields: Fields) -> tuple[str, bool]:
    """The activation, and whether it gates another product."""
    name = fields.text("feed_forward_proj", "relu")
    gated = name.startswith("gated-")
    activation = name.removeprefix("gated-")
    if name == "gated-gelu":
        activation = "gelu_new"  # for the first of these checkpoints, and so for all
    if activation not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise fields.wrong("feed_forward_proj", f"{known} are supported, and each behind gated-")
    # Written by transformers beside it, and read again by it: they must say the same.
    if fields.text("dense_act_fn", activation) != activation:
        raise fields.wrong("dense_act_fn", f"feed_forward_proj {name} says {activation}")
    if fields.flag("is_gated_act", gated) != gated:
        raise fields.wrong("is_gated_act", f"feed_forward_proj {name} contradicts it")
    return activation, gated


def _weights() -> WeightTable:
    def attention(name: str, ours: str) -> dict[str, Place]:
        parts = {"q": Part.Q, "k": Part.K, "v": Part.V}
        return {
            **{f"{name}.{x}.weight": Place(f"{ours}.qkv_proj.weight", part) for x, part in parts.items()},
            f"{name}.o.weight": Place(f"{ours}.o_proj.weight"),
        }

    def feed_forward(layer: int) -> dict[str, Place]:
        name = f"layer.{layer}.DenseReluDense"
        return {
            f"{name}.wi_0.weight": Place("mlp.gate_up_proj.weight", Part.GATE),
            f"{name}.wi_1.weight": Place("mlp.gate_up_proj.weight", Part.UP),
            f"{name}.wi.weight": Place("mlp.up_proj.weight"),
            f"{name}.wo.weight": Place("mlp.down_proj.weight"),
            f"layer.{layer}.layer_norm.weight": Place("mlp_norm.weight"),
        }

    text = {
        **attention("layer.0.SelfAttention", "attn"),
        "layer.0.layer_norm.weight": Place("attn_norm.weight"),
    }
    source = {
        f"layer.1.EncDecAttention.{x}.weight": Place(f"source_attn.{x}_proj.weight") for x in "qkvo"
    } | {"layer.1.layer_norm.weight": Place("source_norm.weight")}
    sides = {
        "encoder": ("encoder.layers.{}.", Section.ENCODER, {**text, **feed_forward(1)}),
        "decoder": ("layers.{}.", Section.ALL, {**text, **source, **feed_forward(2)}),
    }
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        "shared.weight": Place("embedding.weight"),
        "lm_head.weight": Place("head.weight"),
        f"encoder.{bias}": Place("encoder.relative.weight"),
        f"decoder.{bias}": Place("relative.weight"),
        "encoder.final_layer_norm.weight": Place("encoder.norm.weight"),
        "decoder.final_layer_norm.weight": Place("norm.weight"),
        # Copies of `shared`, and a table that nothing reads, in the first published checkpoints.
        "encoder.embed_tokens.weight": None,
        "decoder.embed_tokens.weight": None,
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": None,
        **{
            f"{side}.block.{{}}.{name}": replace(place, parameter=ours + place.parameter, section=section)
            for side, (ours, section, table) in sides.items()
            for name, place in table.items()
        },
    }


def write_config(config: LoopedConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back as this config; ValueError where it can't hold it."""
    encoder, bias = config.encoder, config.relative_bias
    assert encoder is not None
    assert bias is not None
    activation = {"gelu_new": "gelu"}.get(config.activation, config.activation)
    raw = {
        "architectures": [LOOPED_CLASS],
        "d_ff": config.intermediate_size,
        "d_kv": config.head_dim,
        "d_model": config.hidden_size,
        "decoder_start_token_id": encoder.start_token_id,
        "eos_token_id": write_token_ids(config.eos_token_ids),
        "feed_forward_proj": f"gated-{activation}" if config.gated_mlp else config.activation,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.norm_eps,
        "model_type": LOOPED,
        "num_decoder_layers": config.num_block_layers,
        "num_decoder_loops": config.num_loops,
        "num_heads": config.num_heads,
        "num_layers": encoder.num_layers,
        "pad_token_id": encoder.start_token_id,
        "relative_attention_max_distance": bias.max_distance,
        "relative_attention_num_buckets": bias.num_buckets,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
    if read_config(raw, LOOPED) != replace(config, family=LOOPED):
        raise ValueError(f"a {config.family} model does not fit the {LOOPED} layout: {config}")
    return raw


PLAIN_CLASS, LOOPED_CLASS = "T5ForConditionalGeneration", "T5LoopForConditionalGeneration"

PLAIN_FAMILY = Family(
    name=PLAIN,
    model_type=PLAIN,
    architectures=(PLAIN_CLASS,),
    read_config=lambda raw: read_config(raw, PLAIN),
    weights=_weights(),
)

LOOPED_FAMILY = Family(
    name=LOOPED,
    model_type=LOOPED,
    architectures=(LOOPED_CLASS,),
    read_config=lambda raw: read_config(raw, LOOPED),
    weights=_weights(),
    layout=Layout(lambda config: config.encoder is not None, write_config),
)
