"""A GGUF file holds the model: what llama.cpp reads from it gives our own logits."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cli.main import main
from model.checkpoint.gguf_file import ExportError, Vocabulary, check, interleaved
from model.checkpoint.loader import save_checkpoint
from model.network.config import NormPlacement, RopeConfig
from model.network.looped import LoopedTransformer
from tests.loose import Json
from tests.text_tools import byte_tokenizer
from tests.tiny_models import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> LoopedTransformer:
    """Written to `tmp_path`."""
    model = tiny_model(num_loops=3, vocab_size=257, tie_embeddings=False)
    save_checkpoint(model, tmp_path, torch.float32)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return model


def exported(folder: Path, kind: str) -> gguf.GGUFReader:
    target = folder / "model.gguf"
    assert main(["export", str(folder), "--gguf", str(target), "--type", kind]) == 0
    return gguf.GGUFReader(target)


def numbers(model: LoopedTransformer, module: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = model.get_parameter(f"{module}.weight").detach().numpy()
    return values


def test_every_weight_comes_back(model: LoopedTransformer, tmp_path: Path) -> None:
    stored = {tensor.name: tensor.data for tensor in exported(tmp_path, "f32").tensors}
    config = model.config
    width = config.num_heads * config.head_dim
    assert len(stored) == 3 + 9 * config.num_block_layers
    assert sum(tensor.size for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
    for name, ours in (("token_embd", "embedding"), ("output", "head"), ("output_norm", "norm")):
        assert np.array_equal(stored[f"{name}.weight"], numbers(model, ours))
    qkv = numbers(model, "layers.1.attn.qkv_proj")
    assert np.array_equal(stored["blk.1.attn_q.weight"], interleaved(qkv[:width], config.head_dim))
    assert np.array_equal(stored["blk.0.ffn_down.weight"], numbers(model, "layers.0.mlp.down_proj"))


def test_rotating_neighbours_of_what_is_written_is_rotating_halves_of_what_was_read() -> None:
    """The scores of attention are the same: llama.cpp pairs channels (0, 1), the checkpoint (0, d / 2)."""
    generator = np.random.default_rng(0)
    dim, inputs = 8, 12
    q, k = (generator.standard_normal((dim, inputs), np.float32) for _ in range(2))
    x, y = (generator.standard_normal(inputs) for _ in range(2))
    angles = generator.standard_normal((2, dim // 2))

    def turned(pairs: NDArray[np.float64], angle: NDArray[np.float64]) -> NDArray[np.float64]:  # (d / 2, 2)
        a, b = pairs.T
        return np.stack((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), 1)

    halves = [turned((w @ v).reshape(2, -1).T, a) for w, v, a in ((q, x, angles[0]), (k, y, angles[1]))]
    neighbours = [
        turned((interleaved(w, dim) @ v).reshape(-1, 2), a)
        for w, v, a in ((q, x, angles[0]), (k, y, angles[1]))
    ]
    assert np.vdot(*neighbours) == pytest.approx(np.vdot(*halves), rel=1e-6)


def test_sizes_and_vocabulary_are_told(model: LoopedTransformer, tmp_path: Path) -> None:
    fields = exported(tmp_path, "bf16").fields
    config = model.config
    for name, value in {
        "general.architecture": "nanbeige",
        "nanbeige.num_loops": config.num_loops,
        "nanbeige.block_count": config.num_block_layers,
        "nanbeige.skip_loop_final_norm": not config.norm_after_loop,
        "nanbeige.attention.head_count_kv": config.num_kv_heads,
        "nanbeige.rope.freq_base": pytest.approx(config.rope.theta),
        "tokenizer.ggml.model": "gpt2",
    }.items():
        assert fields[name].contents() == value
    tokens, kinds = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == config.vocab_size == 257
    assert (tokens[256], kinds[256], set(kinds[:256])) == ("<eos>", 3, {1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_placement": NormPlacement.SANDWICH}, "Nanbeige's layout alone"),
        ({"mlp_bias": True}, "no biases"),
        ({"activation": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope": RopeConfig(kind="linear", factor=2.0)}, "rope_scaling is 'linear'"),
        ({"intermediate_size": 48}, "intermediate_size is 48; q8_0 needs a multiple of 32"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(change: dict[str, Json], words: str) -> None:
    config = replace(tiny_model().config, family="nanbeige", intermediate_size=64)
    check(config, "q8_0")
    with pytest.raises(ExportError, match=words):
        check(replace(config, **change), "q8_0")


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused() -> None:
    """It ended in a traceback."""
    raw = json.loads(byte_tokenizer().to_str())
    assert len(Vocabulary(raw, 257).tokens) == 257
    with pytest.raises(ExportError, match="token 255 is beyond the model's vocabulary of 255"):
        Vocabulary(raw, 255)


def test_a_model_without_a_tokenizer_is_refused(
    model: LoopedTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").unlink()
    assert main(["export", str(tmp_path), "--gguf", str(tmp_path / "model.gguf"), "--type", "f32"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "model.gguf").exists()
