"""Families at any size that their configs allow, against float64 forward passes written apart from them.

The golden folders are samples; here sizes, head ratios, tied heads, RoPE scalings, windows and loops vary.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, Olmo2Config, Olmo2ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model import LoadedModel, load_model
from model.checkpoint.families.llama import FAMILY as LLAMA
from model.network.config import LoopedConfig
from model.network.looped import LoopedTransformer
from tests import slow_reference as slow
from tests.loose import Json

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**31)
# Norms of a few channels that are nearly zero magnify rounding a thousandfold where epsilon is small.
EPSILONS = st.sampled_from([1e-3, 1e-2])
texts = st.lists(st.integers(0, 10), min_size=1, max_size=24)


def loaded(raw: dict[str, Json], weights: slow.Weights) -> LoadedModel:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(raw))
        save_file({k: w.astype(np.float32) for k, w in weights.items()}, folder / "model.safetensors")
        model = load_model(folder)
    model.model.double()  # but for the rotary angles, so that what differs is a mistake
    return model


def assert_equal_at_every_depth(
    model: LoadedModel, ids: list[int], wanted: list[slow.Array], initial_state: slow.Array | None = None
) -> None:
    assert model.config.num_loops == len(wanted)
    state = None if initial_state is None else initial_state.astype(np.float32)
    for depth, logits in enumerate(wanted, start=1):
        found = model.logits(ids, depth, state).numpy()
        np.testing.assert_allclose(found, logits, atol=5e-4, rtol=1e-4, err_msg=f"depth {depth}")


@st.composite
def ropes(draw: st.DrawFn, longest: int) -> tuple[Json, float]:
    """(rope_scaling of a config.json, theta)."""
    theta = draw(st.floats(10.0, 1e6))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": longest // 4}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = longest // 2
    return draw(st.sampled_from([None, {"type": "linear", "factor": 2.5}, llama3, yarn])), theta


def frequencies(raw: dict[str, Json], head_dim: int) -> tuple[slow.Array, float]:
    """By transformers: the formulas of its scalings are compared in test_rope."""
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return raw["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim), 1.0
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=raw["max_position_embeddings"],
        rope_parameters={**scaling, "rope_type": kind, "rope_theta": raw["rope_theta"]},
    )
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    return inverse.double().numpy(), scale


@st.composite
def llama_shapes(draw: st.DrawFn) -> dict[str, Json]:
    """The fields that every family with Llama's layers has in its config.json."""
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim = 2 * draw(st.integers(1, 5))
    given_dim = draw(st.booleans())
    heads = groups * share
    scaling, theta = draw(ropes(64))
    return {
        "vocab_size": draw(st.integers(11, 40)),
        "hidden_size": 2 * draw(st.integers(2, 16)) if given_dim else heads * dim,
        **({"head_dim": dim} if given_dim else {}),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(EPSILONS),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": draw(st.booleans()),
    }


def rope_of(raw: dict[str, Json]) -> tuple[slow.Array, float]:
    return frequencies(raw, raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


@few
@given(llama_shapes(), texts, seeds, st.data())
def test_ouro(shape: dict[str, Json], ids: list[int], seed: int, data: st.DataObject) -> None:
    layers = shape["num_hidden_layers"]
    kinds = st.lists(
        st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers
    )
    raw = {
        **shape,
        "architectures": ["OuroForCausalLM"],
        "total_ut_steps": data.draw(st.integers(1, 5)),
        "use_sliding_window": True,
        "sliding_window": data.draw(st.integers(1, 9)),
        "layer_types": data.draw(kinds),
    }
    norms = (*PRE_NORMS, "input_layernorm_2", "post_attention_layernorm_2")
    gate = {"model.early_exit_gate.weight": (1, raw["hidden_size"]), "model.early_exit_gate.bias": (1,)}
    weights = slow.random_weights({**slow.llama_shapes(raw, norms), **gate}, seed)
    logits, gates = slow.ouro(raw, weights, rope_of(raw), ids)
    model = loaded(raw, weights)
    assert_equal_at_every_depth(model, ids, logits)
    np.testing.assert_allclose(model.gate_logits(ids).numpy(), gates, atol=5e-4)


@few
@given(llama_shapes(), texts, seeds, st.data())
def test_nanbeige(shape: dict[str, Json], ids: list[int], seed: int, data: st.DataObject) -> None:
    raw = {
        **shape,
        "architectures": ["NanbeigeForCausalLM"],
        "num_loops": data.draw(st.integers(1, 5)),
        "skip_loop_final_norm": data.draw(st.booleans()),
        "attention_bias": data.draw(st.booleans()),
        "mlp_bias": data.draw(st.booleans()),
    }
    weights = slow.random_weights(slow.llama_shapes(raw, PRE_NORMS), seed)
    assert_equal_at_every_depth(loaded(raw, weights), ids, slow.nanbeige(raw, weights, rope_of(raw), ids))


@few
@given(llama_shapes(), texts, seeds, st.integers(1, 4), st.integers(1, 9))
def test_iquest(shape: dict[str, Json], ids: list[int], seed: int, loops: int, window: int) -> None:
    raw = {
        **shape,
        "architectures": ["IQuestLoopCoderForCausalLM"],
        "loop_num": loops,
        "loop_window_size": window,
    }
    dim, heads = (
        raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        raw["num_attention_heads"],
    )
    shapes = slow.llama_shapes(raw, PRE_NORMS)
    for layer in range(raw["num_hidden_layers"]):
        shapes[f"model.gate_projections.{layer}.weight"] = (heads, dim)
        shapes[f"model.gate_projections.{layer}.bias"] = (heads,)
    weights = slow.random_weights(shapes, seed)
    assert_equal_at_every_depth(loaded(raw, weights), ids, slow.iquest(raw, weights, rope_of(raw), ids))


@st.composite
def ravens(draw: st.DrawFn, kind: str) -> dict[str, Json]:
    heads = draw(st.integers(1, 4))
    groups = (
        heads
        if kind == "huginn"
        else draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0]))
    )
    scaling, theta = draw(ropes(64))
    modes = ["random", "embed-init", "skip-adapter"] if kind == "olmo" else ["random"]
    given_dim = draw(st.sampled_from([None, 2, 6]))  # a key that OLMo's block reads and the others ignore
    return {
        "architectures": ["RavenForCausalLM"],
        "vocab_size": draw(st.integers(11, 40)),
        **({"head_dim": given_dim} if given_dim else {}),
        "n_embd": draw(st.integers(3, 12))
        if given_dim and kind == "olmo"
        else heads * 2 * draw(st.integers(1, 5)),
        "n_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": draw(st.integers(1, 40)),
        "n_layers_in_prelude": draw(st.integers(1, 2)),
        "n_layers_in_recurrent_block": draw(st.integers(1, 3)),
        "n_layers_in_coda": draw(st.integers(1, 2)),
        "mean_recurrence": draw(st.integers(1, 5)),
        "initial_state_mode": draw(st.sampled_from(modes)),
        "init_values": {"embed_scale": draw(st.sampled_from([1.0, 2.5])), "std": 0.1},
        "norm_eps": draw(EPSILONS),
        "qk_bias": draw(st.booleans()) if kind == "huginn" else False,
        "tie_embeddings": draw(st.booleans()),
        "max_position_embeddings": 64,
        "rope_theta": theta,
        "rope_base": draw(st.floats(10.0, 1e6)),
        "rope_scaling": None if kind == "huginn" else scaling,
    }


@pytest.mark.parametrize("kind", ["huginn", "llama", "olmo"])
@few
@given(data=st.data(), ids=texts, seed=seeds)
def test_raven(kind: str, data: st.DataObject, ids: list[int], seed: int) -> None:
    raw = data.draw(ravens(kind))
    theta = raw["rope_base" if kind == "huginn" else "rope_theta"]
    rope = frequencies({**raw, "rope_theta": theta}, slow.raven_head_dim(raw, kind))
    weights = slow.random_weights(slow.raven_shapes(raw, kind), seed)
    reference, model = slow.Raven(raw, weights, kind, rope), loaded(raw, weights)
    assert_equal_at_every_depth(model, ids, reference.logits(ids, None))
    if raw["initial_state_mode"] != "skip-adapter":
        state = np.random.default_rng(seed).standard_normal((len(ids), raw["n_embd"]))
        state = state.astype(np.float32).astype(np.float64)  # fp32 numbers for both
        assert_equal_at_every_depth(model, ids, reference.logits(ids, state), state)


KINDS = {"sliding_attention": "S", "full_attention": "*"}


def dory_config(
    shape: dict[str, Json], kinds: list[str], profiles: list[int], loops: int, spelling: str
) -> dict[str, Json]:
    """The content of a config.json: `newer`, with entries or layers counted, or `older`."""
    entries = 1 if spelling == "layers" else 2
    prelude, core, coda = (entries * count for count in shape["counts"])
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    raw = {
        "architectures": ["DoryForCausalLM"],
        **{name: shape[name] for name in sizes},
        "num_hidden_layers": entries * len(kinds),
        "n_input_layers": prelude,
        "n_recurrent_layers": core,
        "n_output_layers": coda,
        "n_recurrent_loops": loops,
        "ngpt_alpha_init": shape["alpha_init"],
        "attention_output_gate_logit_scale_init": shape["gate_init"],
        "tie_word_embeddings": shape["tied"],
        "max_position_embeddings": 64,
    }
    if spelling == "older":
        return raw | {
            "hybrid_layer_pattern": "".join(f"{KINDS[kind]}-" for kind in kinds),
            "rope_profile_layers": [profile for profile in profiles for _ in range(2)],
            "rope_theta": shape["thetas"][0],
            "rope_theta_2": shape["thetas"][1],
            "init_method_std": shape["init"],
            "attention_head_dim": shape["head_dim"],
            "swa_window_size": shape["window"],
        }
    types = kinds if spelling == "layers" else [entry for kind in kinds for entry in (kind, "mlp")]
    return raw | {
        "layer_types": types,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in zip(KINDS, shape["thetas"], strict=True)
        },
        "initializer_range": shape["init"],
        "head_dim": shape["head_dim"],
        "sliding_window": shape["window"],
    }


@st.composite
def dories(draw: st.DrawFn) -> dict[str, Json]:
    groups = draw(st.integers(1, 3))
    return {
        "vocab_size": draw(st.integers(11, 40)),
        "hidden_size": draw(st.integers(4, 24)),
        "intermediate_size": draw(st.integers(2, 40)),
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "head_dim": 2 * draw(st.integers(1, 5)),
        "counts": draw(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 2))),
        "alpha_init": draw(st.floats(0.02, 0.3)),
        "gate_init": draw(st.floats(1.0, 20.0)),
        "init": draw(st.floats(0.5, 2.0)),
        "tied": draw(st.booleans()),
        "window": draw(st.integers(1, 9)),
        "thetas": draw(st.tuples(st.floats(10.0, 1e6), st.floats(10.0, 1e7))),
    }


@few
@given(dories(), texts, seeds, st.integers(1, 4), st.data())
def test_dory(shape: dict[str, Json], ids: list[int], seed: int, loops: int, data: st.DataObject) -> None:
    """All spellings of config.json, at the model's own loops; signs of rates, squares of scales and all."""
    count = sum(shape["counts"])
    kinds = data.draw(st.lists(st.sampled_from(list(KINDS)), min_size=count, max_size=count))
    spelling = data.draw(st.sampled_from(["entries", "layers", "older"]))
    profiles = [1 if kind == "sliding_attention" else 2 for kind in kinds]
    if spelling == "older":  # which may give any layer either profile
        profiles = data.draw(st.lists(st.sampled_from([1, 2]), min_size=count, max_size=count))
    layers = [(kind, shape["thetas"][p - 1]) for kind, p in zip(kinds, profiles, strict=True)]
    weights = slow.random_weights(slow.dory_shapes(shape), seed)
    model = loaded(dory_config(shape, kinds, profiles, loops, spelling), weights)
    assert_equal_at_every_depth(model, ids, slow.Dory(shape, weights, layers).logits(ids, loops))


def test_dory_runs_more_loops_than_its_config_says_where_there_is_room(tmp_path: Path) -> None:
    shape: dict[str, Json] = {
        "vocab_size": 30,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "counts": (1, 2, 1),
        "alpha_init": 0.1,
        "gate_init": 3.0,
        "init": 0.7,
        "tied": False,
        "window": 4,
        "thetas": (1e3, 1e5),
    }
    kinds = ["sliding_attention", "full_attention"] * 2
    raw = dory_config(shape, kinds, [1, 2, 1, 2], 2, "entries")
    weights = slow.random_weights(slow.dory_shapes(shape), 3)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({k: w.astype(np.float32) for k, w in weights.items()}, tmp_path / "model.safetensors")
    layers = [(kind, shape["thetas"][kind == "full_attention"]) for kind in kinds]
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = slow.Dory(shape, weights, layers).logits(ids, 4)
    model = load_model(tmp_path, max_loops=4)
    assert (model.config.num_loops, model.config.num_slots) == (2, 1 + 4 * 2 + 1)
    for depth, logits in enumerate(wanted, start=1):
        np.testing.assert_allclose(model.logits(ids, depth).numpy(), logits, atol=5e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="runs 1 to 2"):
        load_model(tmp_path).logits(ids, 3)


@few
@given(llama_shapes(), texts, seeds, st.integers(1, 3), st.integers(1, 3), st.data())
def test_hrm(
    shape: dict[str, Json], ids: list[int], seed: int, high: int, low: int, data: st.DataObject
) -> None:
    layers = shape.pop("num_hidden_layers")
    in_newer_style = data.draw(st.booleans())
    raw = {
        **{k: v for k, v in shape.items() if k != "num_key_value_heads"},
        "architectures": ["HrmTextForCausalLM"],
        "head_dim": rope_dim(shape),
        "H_cycles": high,
        "L_cycles": low,
        "num_hidden_layers": layers * high * (low + 1) if in_newer_style else layers,
        **({"num_layers_per_stack": layers} if in_newer_style else {}),
        "embedding_scale": data.draw(st.sampled_from([None, 3.5])),
        "initializer_range": 0.4,
        "prefix_lm": data.draw(st.booleans()),
    }
    weights = slow.random_weights(slow.hrm_shapes(raw, layers), seed)
    reference, model = slow.Hrm(raw, weights, layers, frequencies(raw, raw["head_dim"])), loaded(raw, weights)
    prefix = data.draw(st.integers(0, len(ids))) if raw["prefix_lm"] else None
    for depth, logits in enumerate(reference.logits(ids, prefix or 0), start=1):
        found = model.logits(ids, depth, prefix=prefix).numpy()
        np.testing.assert_allclose(found, logits, atol=5e-4, rtol=1e-4)


def rope_dim(shape: dict[str, Json]) -> int:
    dim: int = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return dim


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


def test_the_olmo_block_is_that_of_transformers(tmp_path: Path) -> None:
    """A retrofitted OLMo-2 that skips the adapter is, after one loop, an OLMo-2: other names, same layers."""
    sizes: dict[str, Json] = {
        "vocab_size": 50,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 36,
    }
    rope: Json = {"rope_type": "default", "rope_theta": 300.0}
    theirs = Olmo2Config(
        **sizes, hidden_size=32, num_hidden_layers=4, rope_parameters=rope, rms_norm_eps=1e-5
    )
    reference = randomised(Olmo2ForCausalLM(theirs))
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    names = {0: "prelude.0", 1: "core_block.0", 2: "core_block.1", 3: "coda.0"}
    weights = {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
        "transformer.adapter.weight": np.zeros((32, 64)),
    }
    for layer, name in names.items():
        old, new = f"model.layers.{layer}", f"transformer.{name}"
        qkv = [state[f"{old}.self_attn.{p}_proj.weight"] for p in "qkv"]
        weights |= {
            f"{new}.attn.Wqkv.weight": np.concatenate(qkv),
            f"{new}.attn.proj.weight": state[f"{old}.self_attn.o_proj.weight"],
            f"{new}.attn.q_norm.weight": state[f"{old}.self_attn.q_norm.weight"],
            f"{new}.attn.k_norm.weight": state[f"{old}.self_attn.k_norm.weight"],
            f"{new}.norm_1.weight": state[f"{old}.post_attention_layernorm.weight"],
            f"{new}.norm_2.weight": state[f"{old}.post_feedforward_layernorm.weight"],
            f"{new}.mlp.fc.weight": np.concatenate(
                [state[f"{old}.mlp.{p}_proj.weight"] for p in ("gate", "up")]
            ),
            f"{new}.mlp.proj.weight": state[f"{old}.mlp.down_proj.weight"],
        }
    raw = {
        "architectures": ["RavenForCausalLM"],
        "vocab_size": 50,
        "n_embd": 32,
        "n_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 36,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 1,
        "mean_recurrence": 3,
        "norm_eps": 1e-5,
        "initial_state_mode": "skip-adapter",
        "init_values": {"embed_scale": 1.0},
        "tie_embeddings": False,
        "rope_theta": 300.0,
        "max_position_embeddings": 64,
    }
    ids = torch.randint(50, (40,))
    with torch.inference_mode():
        wanted = reference(ids[None]).logits[0]
    torch.testing.assert_close(loaded(raw, weights).logits(ids.tolist(), 1), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [1, 4, 64])
def test_windows_are_those_of_transformers(window: int) -> None:
    """Mistral is Llama with a window on every layer: its W counts the token itself, as ours does."""
    sizes: dict[str, Json] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Json] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    rope: Json = {"rope_type": "default", "rope_theta": 1e4}
    theirs = MistralConfig(**sizes, **heads, sliding_window=window, rope_parameters=rope)
    theirs._attn_implementation = "eager"
    reference = randomised(MistralForCausalLM(theirs))
    config = LoopedConfig(
        family="test",
        **{name: sizes[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_block_layers=2,
        num_loops=1,
        max_positions=64,
        norm_after_loop=True,
        sliding_window=window,
        sliding_layers=(0, 1),
    )
    model, stored = LoopedTransformer(config).eval(), reference.state_dict()
    with torch.inference_mode():
        for name, place in LLAMA.places(config):
            if place and name in stored:
                model.state_dict()[place.parameter][place.rows(config)] = stored[name]
        ids = torch.randint(50, (40,))
        wanted, found = reference(ids[None]).logits[0], model.whole_readout(model.depths(ids[None])[-1])[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
