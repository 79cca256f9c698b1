"""config.json of T5 and t5_loop: defaults, both gates, and a clear error for what can't be served."""

from collections.abc import Mapping

import pytest

from model.checkpoint.families import family_of
from model.network.config import ConfigError, LoopedConfig, RelativeBias
from tests.loose import Json

PLAIN: dict[str, Json] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 100,
    "d_model": 16,
    "d_kv": 5,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}
LOOPED: dict[str, Json] = {
    **PLAIN,
    "architectures": ["T5LoopForConditionalGeneration"],
    "model_type": "t5_loop",
    "num_decoder_layers": 3,
    "num_decoder_loops": 4,
}


def read(raw: Mapping[str, Json]) -> LoopedConfig:
    return family_of(raw).read_config(raw)


def test_defaults_equal_the_class_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.T5Config(), read(PLAIN)
    assert ours.relative_bias == RelativeBias(
        theirs.relative_attention_num_buckets, theirs.relative_attention_max_distance
    )
    assert ours.norm_eps == theirs.layer_norm_epsilon
    assert (ours.activation, ours.gated_mlp) == (theirs.dense_act_fn, theirs.is_gated_act)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.eos_token_ids == (theirs.eos_token_id,)


def test_layers_and_loops() -> None:
    plain, looped = read(PLAIN), read(LOOPED)
    assert plain.encoder is not None
    assert (plain.encoder.num_layers, plain.num_block_layers, plain.num_loops) == (2, 2, 1)
    assert looped.encoder is not None
    assert (looped.encoder.num_layers, looped.num_block_layers, looped.num_loops) == (2, 3, 4)
    assert (looped.num_slots, list(looped.source_caches)) == (12, [3, 4, 5])
    assert looped.kv_heads_per_token == 2 * (12 + 3) * 3


@pytest.mark.parametrize(
    ("name", "activation", "gated"),
    [
        ("relu", "relu", False),
        ("gelu", "gelu", False),
        ("gated-gelu", "gelu_new", True),
        ("gated-silu", "silu", True),
        ("gated-gelu_new", "gelu_new", True),
    ],
)
def test_feed_forward(name: str, activation: str, gated: bool) -> None:
    config = read({**PLAIN, "feed_forward_proj": name})
    assert (config.activation, config.gated_mlp) == (activation, gated)


def test_the_tied_head_alone_is_scaled() -> None:
    assert read(PLAIN).head_scale == 0.25
    assert read({**PLAIN, "tie_word_embeddings": False}).head_scale == 1.0


def test_the_start_token_is_the_padding_token_unless_named() -> None:
    silent = {**PLAIN, "decoder_start_token_id": None, "pad_token_id": 7}
    encoder = read(silent).encoder
    assert encoder is not None
    assert encoder.start_token_id == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False; an encoder alone"),
        ({"num_decoder_loops": 0}, "num_decoder_loops is 0; it must be at least 1"),
        ({"num_decoder_loops": None}, "num_decoder_loops is missing"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj is 'gated-tanh'; gelu, "),
        ({"feed_forward_proj": "half-relu"}, "feed_forward_proj is 'half-relu'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'; feed_forward_proj relu says relu"),
        ({"is_gated_act": True}, "is_gated_act is True; feed_forward_proj relu contradicts it"),
        ({"relative_attention_num_buckets": 3}, "num_buckets is 3; it must be at least 4"),
        ({"relative_attention_max_distance": 16}, "max_distance is 16; it must be greater than .* 16"),
        ({"decoder_start_token_id": None}, "pad_token_id is None; the one token"),
        ({"decoder_start_token_id": [1, 2]}, r"decoder_start_token_id is \[1, 2\]; the one token"),
        ({"decoder_start_token_id": 100}, "start_token_id is 100; it must be below vocab_size, 100"),
        ({"d_model": "16"}, "d_model is '16'; a whole number"),
        ({"num_heads": 0}, "num_heads is 0"),
    ],
)
def test_what_cant_be_served_is_named(changes: dict[str, Json], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read({**LOOPED, **changes})


def test_a_plain_t5_with_loops_is_no_t5() -> None:
    with pytest.raises(ConfigError, match=r"num_decoder_loops is 2; .*T5LoopForConditionalGeneration"):
        read({**PLAIN, "num_decoder_loops": 2})
    assert read({**PLAIN, "num_decoder_loops": 1}) == read(PLAIN)
