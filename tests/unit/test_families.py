"""Reading config.json: defaults, both styles, and one clear error for everything that can't be served."""

import contextlib
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.checkpoint.families import FAMILIES, family_of, raven
from model.checkpoint.families.family import Family
from model.checkpoint.families.nanbeige import write_config
from model.checkpoint.families.quantized import int8_fields, stored_in_int8
from model.network.config import ConfigError, InitialState, LoopedConfig, NormPlacement
from model.schedule.drafts import default_depths
from tests.loose import Json

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
NANBEIGE = {**LLAMA, "architectures": ["NanbeigeForCausalLM"], "model_type": "nanbeige", "num_loops": 2}


OURO = {**LLAMA, "architectures": ["OuroForCausalLM"], "model_type": "ouro", "total_ut_steps": 3}
IQUEST = {**LLAMA, "architectures": ["IQuestLoopCoderForCausalLM"], "model_type": "iquestloopcoder"}
RAVEN = {
    "architectures": ["RavenForCausalLM"],
    "model_type": "huginn_raven",
    "vocab_size": 100,
    "n_embd": 48,
    "n_heads": 4,
    "intermediate_size": 80,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 3,
    "n_layers_in_coda": 2,
    "mean_recurrence": 5,
    "rope_theta": 3e4,
    "rope_base": 5e4,
}
# A tensor that only this one of the three kinds of Raven has.
HUGINN, OLMO = ("transformer.coda.0.norm_3.weight",), ("transformer.coda.0.attn.q_norm.weight",)
RETROFIT = ("transformer.coda.0.norm_1.weight",)


def read(raw: dict[str, Json], names: Collection[str] = ()) -> LoopedConfig:
    return family_of(raw, names).read_config(raw)


def test_defaults_are_those_of_transformers() -> None:
    config = read(LLAMA)
    assert (config.family, config.num_loops, config.num_block_layers) == ("llama", 1, 3)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (4, 12, 2048)
    assert (config.norm_eps, config.activation, config.tie_embeddings) == (1e-6, "silu", False)
    assert (config.rope.kind, config.rope.theta) == ("default", 10000.0)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, False)


def test_defaults_equal_the_class_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.LlamaConfig(), read(LLAMA)
    assert theirs.max_position_embeddings == ours.max_positions
    assert theirs.rms_norm_eps == ours.norm_eps
    assert theirs.hidden_act == ours.activation
    assert theirs.tie_word_embeddings == ours.tie_embeddings
    assert (theirs.attention_bias, theirs.mlp_bias) == (ours.qkv_bias, ours.mlp_bias)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, *ours.eos_token_ids)
    assert theirs.rope_parameters["rope_theta"] == ours.rope.theta


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters"])
def test_null_is_absent(key: str) -> None:
    assert read({**LLAMA, key: None}) == read(LLAMA)


@pytest.mark.parametrize(
    ("given", "ids"),
    [(7, (7,)), ([7, 9], (7, 9)), (None, ()), ([], ()), (0, (0,))],
)
def test_eos_token_ids(given: int | list[int] | None, ids: tuple[int, ...]) -> None:
    assert read({**LLAMA, "eos_token_id": given}).eos_token_ids == ids


def test_attention_bias_is_on_the_output_projection_too() -> None:
    config = read({**LLAMA, "attention_bias": True})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, False)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    "kind", [{"rope_type": "llama3"}, {"type": "llama3"}, {"rope_type": "llama3", "type": "x"}]
)
def test_both_styles_of_rope_are_the_same(kind: dict[str, str]) -> None:
    older = read({**LLAMA, "rope_theta": 5e5, "rope_scaling": {**kind, **LLAMA3}})
    newer = read({**LLAMA, "rope_parameters": {**kind, **LLAMA3, "rope_theta": 5e5}})
    assert older == newer
    assert (older.rope.kind, older.rope.theta, older.rope.original_max_positions) == ("llama3", 5e5, 512)


def test_theta_inside_the_rope_wins_over_the_one_outside() -> None:
    assert read({**LLAMA, "rope_theta": 3.0, "rope_parameters": {"rope_theta": 9.0}}).rope.theta == 9.0


def test_original_length_outside_the_rope_wins() -> None:
    raw = {**LLAMA, "rope_scaling": {"type": "llama3", **LLAMA3}, "original_max_position_embeddings": 64}
    assert read(raw).rope.original_max_positions == 64


def test_yarn_factor_is_implied_by_the_lengths() -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    assert read({**LLAMA, "max_position_embeddings": 2048, "rope_scaling": rope}).rope.factor == 4.0


def test_longrope_is_served_within_the_original_context() -> None:
    rope = {"type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "long_factor": [9.0]}
    raw = {**LLAMA, "max_position_embeddings": 4096, "original_max_position_embeddings": 1024}
    config = read({**raw, "rope_scaling": rope})
    assert (config.max_positions, config.rope.divisors) == (1024, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert config.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(1024)))


def test_dynamic_rope_is_served_within_the_original_context() -> None:
    rope = {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = read({**LLAMA, "max_position_embeddings": 4096, "rope_scaling": rope})
    assert (config.max_positions, config.rope.kind) == (1024, "default")


@pytest.mark.parametrize(
    ("fields", "loops"),
    [
        ({}, 2),
        ({"num_loops": None}, 1),
        ({"loop_loss_weights": []}, 2),
        ({"loop_loss_weights": [0.2, 0.3, 0.1]}, 4),
    ],
)
def test_loss_weights_override_num_loops(fields: dict[str, Json], loops: int) -> None:
    """One weight for each loop but the last; public servers read num_loops alone and run too few."""
    assert read({**NANBEIGE, **fields}).num_loops == loops


@pytest.mark.parametrize("skip", [False, True])
def test_norm_between_loops(skip: bool) -> None:
    assert read({**NANBEIGE, "skip_loop_final_norm": skip}).norm_after_loop is not skip


REFUSED: dict[str, list[Json]] = {
    "hidden_size": [None, "48", 48.0, True, 0, -4, 50],
    "vocab_size": [None, [100], 0],
    "num_hidden_layers": [None, 0],
    "num_attention_heads": [None, 5],
    "intermediate_size": [None, {}],
    "num_key_value_heads": [3, 8, 0, "4"],
    "head_dim": [13, 0, 1.5],
    "hidden_act": ["softplus", 3],
    "rms_norm_eps": [0, -1e-6, "1e-5", math.nan, math.inf],
    "tie_word_embeddings": ["yes", 1],
    "attention_bias": ["q"],
    "eos_token_id": ["</s>", -1, [2, None], 2.0, True],
    "max_position_embeddings": [0, "2048"],
    "rope_theta": [0, "1e4", 1.0],
    "partial_rotary_factor": [0.5],
    "sliding_window": [4096],
    "layer_types": [["full_attention", "sliding_attention"], "full_attention"],
    "is_causal": [False],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in REFUSED.items() for v in values])
def test_a_bad_field_is_an_error_that_names_it(
    key: str, value: Sequence[object] | bool | dict[str, Json] | float | str | None
) -> None:
    with pytest.raises(ConfigError, match=key):
        read({**LLAMA, key: value})


REFUSED_ROPE: list[tuple[str, dict[str, Json]]] = [
    ("short_factor", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    ("short_factor", {"rope_type": "longrope", "short_factor": [1.0, "2"], "long_factor": [1.0]}),
    ("long_factor", {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": 2.0}),
    ("rope_type", {"rope_type": "proportional"}),
    ("rope_type", {"rope_type": 7}),
    ("factor", {"rope_type": "linear"}),
    ("factor", {"rope_type": "linear", "factor": "2"}),
    ("factor", {"rope_type": "linear", "factor": -2.0}),
    ("factor", {"rope_type": "dynamic"}),
    ("low_freq_factor", {"rope_type": "llama3", "factor": 8.0}),
    ("high_freq_factor", {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}),
    ("original_max_position_embeddings", {"rope_type": "yarn", "original_max_position_embeddings": "8k"}),
    ("beta_fast", {"rope_type": "yarn", "beta_fast": 0.5}),
    ("truncate", {"rope_type": "yarn", "truncate": 1}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("full_attention", {"full_attention": {"rope_type": "default"}}),
    ("mrope_section", {"mrope_section": [1, 2, 3]}),
]


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("key", "rope"), REFUSED_ROPE)
def test_a_bad_rope_is_an_error_that_names_the_field(where: str, key: str, rope: dict[str, Json]) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        read({**LLAMA, where: rope})
    assert where in str(error.value) or key in ("rope_type", "short_factor")


@pytest.mark.parametrize(
    "key",
    [
        *("qk_layernorm", "emb_neighbor_num", "enable_double_loop_split", "loop_share_kv"),
        *("enable_hyper_connection", "enable_mhc", "enable_depth_attention", "ngram_insert_all_layers"),
    ],
)
def test_nanbeige_options_that_are_not_plain_looping_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        read({**NANBEIGE, key: 1})


@pytest.mark.parametrize("loops", [0, -1, 2.0, "2"])
def test_bad_num_loops(loops: float | str) -> None:
    with pytest.raises(ConfigError, match="num_loops"):
        read({**NANBEIGE, "num_loops": loops})


def test_an_inactive_sliding_window_is_fine() -> None:
    assert read({**LLAMA, "sliding_window": 4096, "use_sliding_window": False}) == read(LLAMA)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["MistralForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": None, "model_type": "gpt2"},
        {"architectures": None, "model_type": None},
        {"architectures": None, "model_type": ["llama"]},
    ],
)
def test_an_unknown_architecture_is_an_error_that_lists_the_served_ones(fields: dict[str, Json]) -> None:
    with pytest.raises(ConfigError, match=r"(?i)llama"):
        read({**LLAMA, **fields})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architectures": ["Inkling2LoopForConditionalGeneration"]}, "mixtures of experts"),
        ({"architectures": None, "model_type": "inkling2_loop_text"}, "mixtures of experts"),
        ({"architectures": ["SomeRemoteCode"], "model_type": "sensenova_loop"}, "linear attention"),
        ({"architectures": None, "model_type": "parcae"}, "pickles"),
    ],
)
def test_a_looped_model_that_is_not_served_is_refused_with_what_it_would_take(
    fields: dict[str, Json], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*would take"):
        read({**LLAMA, **fields})


def test_model_type_decides_where_no_architecture_is_given() -> None:
    assert family_of({"model_type": "nanbeige"}).name == "nanbeige"


ROPES = [
    None,
    {"type": "linear", "factor": 2.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 1.0},
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("eos", [None, 3, [3, 4]])
def test_a_written_config_reads_back_as_itself(
    rope: dict[str, Json] | None, eos: int | list[int] | None
) -> None:
    fields = {
        "rope_scaling": rope,
        "eos_token_id": eos,
        "skip_loop_final_norm": eos is None,
        "bos_token_id": None,
    }
    config = read({**NANBEIGE, **fields, "hidden_act": "gelu", "attention_bias": True, "head_dim": 10})
    assert read(write_config(config)) == config


def test_ouro_options_that_take_another_depth_are_refused() -> None:
    for fields in ({"early_exit_threshold": 0.9}, {"early_exit_step": 1}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            read({**OURO, **fields})


def test_ouro_defaults() -> None:
    """OuroConfig ignores sliding_window unless use_sliding_window is true; elsewhere it counts by itself."""
    config = read({**OURO, "sliding_window": 4096})
    assert (config.num_loops, config.max_positions, config.eos_token_ids) == (3, 32768, ())
    assert config.sliding_window is None


SLIDING = "sliding_attention"


@pytest.mark.parametrize(
    ("fields", "window", "layers"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, 4096, (1, 2)),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7, (0, 1, 2)),
        ({"use_sliding_window": True, "sliding_window": 7}, None, ()),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None, ()),
        ({"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}, None, ()),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": [SLIDING, "full_attention", SLIDING],
            },
            7,
            (0, 2),
        ),
    ],
)
def test_which_of_ouros_layers_are_windowed(
    fields: dict[str, Json], window: int | None, layers: tuple[int, ...]
) -> None:
    """As OuroConfig: layer_types decides, else all layers from max_window_layers (28) on."""
    config = read({**OURO, **fields})
    assert (config.sliding_window, config.sliding_layers) == (window, layers)
    assert [config.is_windowed(layer) for layer in range(3)] == [layer in layers for layer in range(3)]


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": [SLIDING] * 3},
        {"layer_types": [SLIDING] * 3, "use_sliding_window": True, "sliding_window": None},
        {"layer_types": [SLIDING] * 2, "use_sliding_window": True},
        {"layer_types": ["chunked_attention"] * 3, "use_sliding_window": True},
    ],
)
def test_ouro_layer_types_that_make_no_sense_are_an_error_that_names_them(fields: dict[str, Json]) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        read({**OURO, **fields})


def test_iquest_defaults() -> None:
    config = read(IQUEST)
    assert (config.num_loops, config.sliding_window, config.first_loop_gate) == (2, 64, True)
    assert (config.max_positions, config.norm_eps, config.rope.theta) == (8192, 1e-5, 5e5)
    assert [config.window(0, loop) for loop in range(2)] == [None, 64]
    assert not config.norm_after_loop


@pytest.mark.parametrize("value", [0, -1, "64", 6.5])
@pytest.mark.parametrize("key", ["loop_num", "loop_window_size"])
def test_a_bad_iquest_field_is_an_error_that_names_it(key: str, value: float | str) -> None:
    with pytest.raises(ConfigError, match=key):
        read({**IQUEST, key: value})


@pytest.mark.parametrize(
    ("loops", "depths"),
    [(1, ()), (2, (1,)), (3, (1, 2)), (4, (1, 2)), (12, (1, 2)), (16, (1, 4)), (32, (2, 8)), (64, (4, 16))],
)
def test_draft_depths_that_a_model_gets_by_itself(loops: int, depths: tuple[int, ...]) -> None:
    assert default_depths(loops, loops) == depths


@pytest.mark.parametrize(
    ("names", "placement", "theta", "interleaved"),
    [
        (HUGINN, NormPlacement.POST_ADD, 5e4, True),
        (RETROFIT, NormPlacement.PRE, 3e4, False),
        (OLMO + RETROFIT, NormPlacement.OUTPUT, 3e4, False),
    ],
)
def test_the_three_kinds_of_raven_are_told_apart_by_their_tensors(
    names: Collection[str], placement: NormPlacement, theta: float, interleaved: bool
) -> None:
    config = read({**RAVEN, "qk_bias": names == HUGINN}, names)
    assert (config.norm_placement, config.rope.theta) == (placement, theta)
    assert (config.rope.interleaved, config.qk_bias) == (interleaved, names == HUGINN)
    assert (config.prelude, config.block, config.coda) == (range(1), range(1, 4), range(4, 6))
    assert config.embedding_scale == math.sqrt(48)


@pytest.mark.parametrize(
    ("mode", "start"),
    [
        ("random", InitialState.NOISE),
        ("embed-init", InitialState.INPUT),
        ("skip-adapter", InitialState.INPUT_ALONE),
    ],
)
def test_the_starts_of_a_retrofitted_olmo(mode: str, start: InitialState) -> None:
    """The published Llama class has no such option: there it is refused."""
    raw = {**RAVEN, "qk_bias": False, "initial_state_mode": mode}
    assert read(raw, OLMO + RETROFIT).initial_state is start
    if mode != "random":
        with pytest.raises(ConfigError, match="initial_state_mode"):
            read(raw, RETROFIT)


def test_olmos_block_alone_has_a_head_dim_of_its_own() -> None:
    """Llama's and Huginn's published blocks use n_embd / n_heads whatever the key says."""
    raw = {**RAVEN, "qk_bias": False, "head_dim": 10}
    assert read(raw, OLMO + RETROFIT).head_dim == 10
    assert read({**raw, "n_embd": 50}, OLMO + RETROFIT).head_dim == 10
    assert read(raw, RETROFIT).head_dim == read(raw, HUGINN).head_dim == 12
    with pytest.raises(ConfigError, match="rotary"):
        read({**raw, "head_dim": 9}, OLMO + RETROFIT)


def test_a_raven_of_no_known_kind() -> None:
    with pytest.raises(ConfigError, match="Huginn"):
        read(RAVEN, ("transformer.coda.0.norm_7.weight",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("initial_state_mode", "zeros"),
        ("initial_state_mode", "skip-adapter"),
        ("init_values", {"std": -1.0}),
        ("initial_state_mode", "embed-init"),
        ("test_time_noise", 0.1),
        ("bias", True),
        ("nonlin_name", "GELU"),
        ("block_class_name", "TransformerPreNormBlock"),
        ("injection_type", "add"),
        ("n_heads", 5),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 2),
        ("mean_recurrence", None),
        ("init_values", {"embed_scale": 0}),
    ],
)
def test_a_bad_raven_field_is_an_error_that_names_it(
    key: str, value: bool | dict[str, Json] | float | str | None
) -> None:
    with pytest.raises(ConfigError, match=next(iter(value)) if isinstance(value, dict) else key):
        read({**RAVEN, key: value}, HUGINN)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("sizes", [(1, 2), (2, 0), (0, 0)])
def test_a_written_raven_config_reads_back_as_itself(
    rope: dict[str, Json] | None, sizes: tuple[int, int]
) -> None:
    prelude, coda = sizes
    fields = {
        "n_layers_in_prelude": prelude,
        "n_layers_in_coda": coda,
        "rope_scaling": rope,
        "init_values": {"embed_scale": 1.0, "std": 0.02},
        "eos_token_id": [3, 4],
        "bos_token_id": 5,
        "tie_embeddings": coda == 0,
        "max_position_embeddings": 512,
    }
    config = read({**RAVEN, **fields}, RETROFIT)
    assert (len(config.prelude), len(config.coda)) == sizes
    assert read(raven.write_config(config), RETROFIT) == config


@pytest.mark.parametrize("value", [None, -1, "0", False, 0.0])
@pytest.mark.parametrize("key", ["n_layers_in_prelude", "n_layers_in_coda"])
def test_a_raven_count_of_layers_that_makes_no_sense_is_an_error_that_names_it(
    key: str, value: bool | float | str | None
) -> None:
    with pytest.raises(ConfigError, match=key):
        read({**RAVEN, key: value}, RETROFIT)


def test_numbers_of_layers_on_disk_start_anew_in_each_section() -> None:
    config = read(RAVEN, HUGINN)
    places = {n: p.parameter for n, p in family_of(RAVEN, HUGINN).places(config) if p and "norm_1" in n}
    assert places == {
        "transformer.prelude.0.norm_1.weight": "layers.0.attn_norm.weight",
        **{f"transformer.core_block.{i}.norm_1.weight": f"layers.{i + 1}.attn_norm.weight" for i in range(3)},
        **{f"transformer.coda.{i}.norm_1.weight": f"layers.{i + 4}.attn_norm.weight" for i in range(2)},
    }


QUANTIZED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": 1.2,
    "kv_cache_scheme": None,
    "sparsity_config": {},
    "ignore": ["lm_head"],
    "version": "0.13.0",
}
QUANTIZED_WEIGHTS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
    "group_size": None,
    "block_structure": None,
    "actorder": None,
    "observer": "minmax",
    "observer_kwargs": {},
}


def quantized(weights: Json = None, group: Json = None, **fields: Json) -> dict[str, Json]:
    """A config.json's content, with changes to the three levels of its quantization_config."""
    whole = {"targets": ["Linear"], "weights": {**QUANTIZED_WEIGHTS, **(weights or {})}, **(group or {})}
    return {**LLAMA, "quantization_config": {**QUANTIZED, "config_groups": {"group_0": whole}, **fields}}


@pytest.mark.parametrize("raw", [LLAMA, {**LLAMA, "quantization_config": None}])
def test_a_checkpoint_that_is_not_quantised(raw: dict[str, Json]) -> None:
    assert not stored_in_int8(raw)


@pytest.mark.parametrize(
    "raw",
    [
        quantized(),
        quantized(sparsity_config={"format": "dense", "sparsity_structure": "2:4"}),
        quantized({"group_size": -1, "actorder": "static"}),
        quantized(group={"input_activations": None, "output_activations": None, "format": "int-quantized"}),
        int8_fields(),
    ],
)
def test_int8_weights_with_a_scale_for_each_channel_are_read(raw: dict[str, Json]) -> None:
    assert stored_in_int8(raw)
    two = quantized()["quantization_config"]
    two["config_groups"]["group_1"] = {"targets": ["re:.*"], "weights": QUANTIZED_WEIGHTS}
    assert stored_in_int8({"quantization_config": two})


QUANTIZED_KEYS = (
    sorted(QUANTIZED_WEIGHTS),
    ["targets", "weights", "input_activations", "output_activations", "format"],
    sorted({*QUANTIZED, "config_groups"}),
)
REFUSED_QUANTIZED = [
    ("quant_method", quantized(quant_method="fp8")),
    ("quant_method", quantized(quant_method=None)),
    ("quant_method", {"quantization_config": {"bits": 4}}),
    ("quantization_config", {"quantization_config": "int8"}),
    ("format", quantized(format="pack-quantized")),
    ("format", quantized(format=None)),
    ("quantization_status", quantized(quantization_status="frozen")),
    ("kv_cache_scheme", quantized(kv_cache_scheme={"num_bits": 8})),
    ("sparsity_config", quantized(sparsity_config={"format": "sparse-bitmask"})),
    ("transform_config", quantized(transform_config={"config_groups": {"R1": {}}})),
    ("modules_to_convert", quantized(modules_to_convert=["lm_head"])),
    ("config_groups", quantized(config_groups=None)),
    ("config_groups", quantized(config_groups={})),
    ("config_groups.W8A8", quantized(config_groups={"W8A8": ["Linear"]})),
    ("input_activations", quantized(group={"input_activations": {"num_bits": 8}})),
    ("output_activations", quantized(group={"output_activations": {"num_bits": 8}})),
    ("group_0.format", quantized(group={"format": "float-quantized"})),
    ("weights.num_bits", quantized(group={"weights": None})),
    ("weights.num_bits", quantized({"num_bits": 4})),
    ("weights.num_bits", quantized({"num_bits": {"mlp": 8}})),
    ("weights.type", quantized({"type": "float"})),
    ("weights.symmetric", quantized({"symmetric": False})),
    ("weights.strategy", quantized({"strategy": "group", "group_size": 128})),
    ("weights.strategy", quantized({"strategy": "tensor"})),
    ("weights.strategy", quantized({"strategy": None})),
    ("weights.group_size", quantized({"group_size": 64})),
    ("weights.dynamic", quantized({"dynamic": True})),
    ("weights.actorder", quantized({"actorder": "group"})),
    ("weights.block_structure", quantized({"block_structure": [128, 128]})),
    ("weights.is_mse", quantized({"is_mse": True})),
]


@pytest.mark.parametrize(("key", "raw"), REFUSED_QUANTIZED)
def test_any_other_quantisation_is_an_error_that_names_the_field_and_what_is_read(
    key: str, raw: dict[str, Json]
) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is .*; ") as error:
        stored_in_int8(raw)
    if key not in ("quantization_config", "config_groups.W8A8"):
        assert "int8, symmetric, a scale per output channel" in str(error.value)


texts = st.text("a_0\0é\U0001f600", max_size=5)  # of all characters, the first draw takes seconds
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)
OWN_KEYS = (
    "num_loops",
    "loop_loss_weights",
    "loop_num",
    "loop_window_size",
    "initial_state_mode",
    "init_values",
)
WINDOW_KEYS = ("use_sliding_window", "max_window_layers", "layer_types", "rope_scaling")
KEYS = sorted({*REFUSED, *RAVEN, *(key for _, rope in REFUSED_ROPE for key in rope), *OWN_KEYS, *WINDOW_KEYS})
ropes = st.fixed_dictionaries({}, optional={key: json_values for _, rope in REFUSED_ROPE for key in rope})


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(
        [
            *((LLAMA, ()), (NANBEIGE, ()), (OURO, ()), (IQUEST, ())),
            *((RAVEN, HUGINN), (RAVEN, RETROFIT), (RAVEN, OLMO + RETROFIT)),
        ]
    ),
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4),
    st.none() | ropes,
)
def test_any_json_is_a_config_or_a_config_error(
    base: tuple[dict[str, Json], Collection[str]], fields: dict[str, Json], rope: Json
) -> None:
    raw, names = base
    with contextlib.suppress(ConfigError):
        assert isinstance(read({**raw, "rope_parameters": rope, **fields}, names), LoopedConfig)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(*[st.dictionaries(st.sampled_from(keys), json_values, max_size=2) for keys in QUANTIZED_KEYS])
def test_any_json_is_a_known_quantisation_or_a_config_error(
    weights: dict[str, Json], group: dict[str, Json], fields: dict[str, Json]
) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(stored_in_int8(quantized(weights, group, **fields)), bool)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_fused_tensors_are_filled_without_a_gap_or_an_overlap(family: Family) -> None:
    config = read({**LLAMA, "num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 4})
    config = replace(config, output_gate=family.name in ("dory", "hrm_text"))
    heights = {"qkv_proj": (4 + 2 + 2 + 4 * config.output_gate) * 10, "gate_up_proj": 2 * 80}
    filled: dict[str, list[int]] = {}
    for _, place in family.places(config):
        fused = place.parameter.removesuffix(".weight").rpartition(".")[-1] if place else ""
        if place and fused in heights:
            filled.setdefault(place.parameter, []).extend(range(heights[fused])[place.rows(config)])
    assert len(filled) >= 2 * config.num_layers
    for parameter, rows in filled.items():
        assert sorted(rows) == list(range(heights[parameter.split(".")[-2]]))


DORY = {
    "architectures": ["DoryForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 8,
    "n_input_layers": 2,
    "n_recurrent_layers": 4,
    "n_output_layers": 2,
    "n_recurrent_loops": 2,
    "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
    "sliding_window": 8,
    "initializer_range": 0.02,
}
OLDER = {
    **{
        k: v
        for k, v in DORY.items()
        if k not in ("head_dim", "layer_types", "sliding_window", "initializer_range")
    },
    "attention_head_dim": 16,
    "hybrid_layer_pattern": "S-*-S-*-",
    "swa_window_size": 8,
    "init_method_std": 0.02,
    "rope_theta": 1e4,
    "rope_theta_2": 1e7,
    "rope_profile_layers": [1, 1, 2, 2] * 2,
}


def test_both_spellings_of_a_dory_config_are_the_same() -> None:
    config = read(DORY)
    assert read(OLDER) == config == read({**OLDER, **DORY})
    assert (config.prelude, config.block, config.coda) == (range(1), range(1, 3), range(3, 4))
    assert (config.sliding_layers, config.second_rope_layers) == ((0, 2), (1, 3))
    assert config.second_rope is not None
    assert (config.rope.theta, config.second_rope.theta) == (1e4, 1e7)
    assert config.num_slots == 1 + 2 * 2 + 1


def test_counts_of_a_dory_config_without_mlp_entries_are_layers() -> None:
    counts = {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": None, "n_output_layers": 1}
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    assert read({**DORY, **counts, **layers}) == read(DORY)
    every_fourth = read({**DORY, **counts, "layer_types": None})
    assert every_fourth.sliding_layers == (0, 1, 2)


DORY_REFUSED = [
    ({"recurrent_kv_cache_mode": "last_loop"}, "recurrent_kv_cache_mode.*predecessor's last"),
    ({"recurrent_kv_cache_mode": "first_loop"}, "recurrent_kv_cache_mode"),
    ({"n_input_layers": 3}, "n_input_layers.*even"),
    ({"n_recurrent_layers": 2}, "n_recurrent_layers.*add up"),
    ({"n_input_layers": 6, "n_recurrent_layers": None}, "add up"),
    ({"n_recurrent_loops": 0}, "n_recurrent_loops"),
    ({"n_recurrent_loops": None}, "n_recurrent_loops"),
    ({"initializer_range": None}, "initializer_range"),
    ({"layer_types": ["mlp", "sliding_attention"] * 4}, "layer_types"),
    ({"layer_types": ["sliding_attention", "mlp"] * 3}, "layer_types"),
    ({"layer_types": ["linear_attention", "mlp"] * 4}, "layer_types"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"attention_bias": True}, "attention_bias"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
    ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    ({"rope_parameters": {"sliding_attention": {}, "full_attention": {"rope_theta": 1e4}}}, "rope_theta"),
    ({"hidden_act": "softplus"}, "hidden_act"),
]
OLDER_REFUSED = [
    ({"hybrid_layer_pattern": "M-*-S-*-"}, "hybrid_layer_pattern"),
    ({"hybrid_layer_pattern": None}, "hybrid_layer_pattern"),
    ({"rope_profile_layers": [1]}, "rope_profile_layers"),
    ({"rope_profile_layers": [0] * 8}, "rope_profile_layers"),
    ({"no_rope_layers": [1] * 8}, "no_rope_layers"),
    ({"swa_head_dim": 8}, "swa_head_dim"),
    ({"ngpt": False}, "ngpt"),
    ({"output_transform": "gated"}, "output_transform"),
    ({"partial_rotary_factor_2": 0.5}, "partial_rotary_factor_2"),
    ({"head_dim": 12}, "head_dim.*attention_head_dim says 16"),
    ({"dory_format_version": 2}, "dory_format_version"),
]


@pytest.mark.parametrize(
    ("raw", "fields", "problem"),
    [(DORY, *each) for each in DORY_REFUSED] + [(OLDER, *each) for each in OLDER_REFUSED],
)
def test_a_dory_option_that_is_not_the_published_maths_is_refused_by_name(
    raw: dict[str, Json], fields: dict[str, Json], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        read({**raw, **fields})


HRM = {
    "architectures": ["HrmTextForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def test_hrm_defaults_are_those_of_its_class() -> None:
    config = read(HRM)
    assert (config.num_loops, config.low_cycles, config.head_dim, config.prefix_lm) == (2, 3, 128, True)
    assert (config.num_block_layers, config.num_caches, config.num_slots) == (4, 8, 16)
    assert config.embedding_scale == 1 / 0.02
    later = {"num_layers_per_stack": 2, "num_hidden_layers": 16}
    assert read({**HRM, **later}) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [("H_cycles", 0), ("L_cycles", 0), ("attention_bias", True), ("mlp_bias", True), ("prefix_lm", "yes")],
)
def test_a_bad_hrm_field_is_an_error_that_names_it(key: str, value: bool | int | str) -> None:
    with pytest.raises(ConfigError, match=key):
        read({**HRM, key: value})


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ],
)
def test_weights_in_nvfp4_are_refused_by_name(quantization: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="NVFP4 are not read"):
        stored_in_int8({**DORY, "quantization_config": quantization})
