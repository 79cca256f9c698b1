"""Tiny random Llama checkpoints of every shape: logits equal transformers' own LlamaForCausalLM."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model import load_model
from tests.loose import Json

TINY = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 500.0}

VARIANTS = {
    "plain": {},
    "multi_head": {"num_key_value_heads": 4},
    "kv_heads_null": {"num_key_value_heads": None},
    "multi_query": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 12},
    "head_dim_larger_than_hidden": {"head_dim": 20, "num_attention_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all_biases_tied": {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 0.1},
    "pretraining_tp": {"pretraining_tp": 2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 100.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "yarn": {"rope_parameters": YARN},
    "yarn_options": {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0, "truncate": False}},
    "yarn_attention_factor": {"rope_parameters": {**YARN, "attention_factor": 1.7}},
    "yarn_mscale": {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}},
    **{name: {"hidden_act": name} for name in ("gelu", "gelu_new", "relu", "relu2", "quick_gelu", "mish")},
}


def reference(options: dict[str, Json]) -> LlamaForCausalLM:
    """A random model; norms and biases too, which transformers would leave at 1 and 0."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **options, "attn_implementation": "eager"}))
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def older_style(raw: dict[str, Json]) -> dict[str, Json]:
    """The same config as version 4 of transformers writes it."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    return raw


@pytest.mark.parametrize("style", ["transformers_5", "transformers_4"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(tmp_path: Path, options: dict[str, object], style: str) -> None:
    model = reference(options)
    model.save_pretrained(tmp_path)
    if style == "transformers_4":
        path = tmp_path / "config.json"
        path.write_text(json.dumps(older_style(json.loads(path.read_text()))))
    ids = torch.randint(67, (90,))
    with torch.inference_mode():
        wanted = model(ids[None], use_cache=False).logits[0]
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(load_model(tmp_path).logits(ids.tolist()), wanted, atol=1e-4, rtol=0)


def test_activations_equal_transformers() -> None:
    """Far from zero as well, where a tiny model's MLP never goes."""
    from transformers.activations import ACT2FN  # noqa: PLC0415

    from model.network import config, layers  # noqa: PLC0415

    x = torch.linspace(-8, 8, 1601)
    assert set(layers.ACTIVATIONS) == config.ACTIVATIONS
    for name, function in layers.ACTIVATIONS.items():
        torch.testing.assert_close(function(x), ACT2FN[name](x), atol=1e-5, rtol=1e-5, msg=name)
