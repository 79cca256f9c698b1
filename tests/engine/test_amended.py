"""Tensors and config.json that do not quite agree: loaded as transformers loads them, or refused."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import load_model, save_checkpoint
from model.checkpoint.files import CheckpointError
from model.checkpoint.loader import load_skeleton
from tests.checkpoint_edits import edit_config, edit_tensors
from tests.tiny_models import tiny_model

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama with a head of its own, as transformers writes it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        architectures=["LlamaForCausalLM"],
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def reference(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


def test_a_head_of_its_own_in_a_tied_model_is_used(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(llama, tie_word_embeddings=True)
    model = load_model(llama)
    assert not model.config.tie_embeddings
    torch.testing.assert_close(model.logits(IDS), reference(llama), rtol=0, atol=1e-4)
    assert HEAD in caplog.text
    assert load_skeleton(llama).config == model.config


def test_a_head_that_is_the_embedding_stays_tied(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(llama, tie_word_embeddings=True)
    edit_tensors(llama, **{HEAD: load_file(llama / "model.safetensors")[EMBEDDING].clone()})
    model = load_model(llama)
    assert model.model.head.weight is model.model.embedding.weight
    torch.testing.assert_close(model.logits(IDS), reference(llama), rtol=0, atol=1e-4)
    assert not caplog.records


def test_a_tied_model_that_stores_the_head_alone(llama: Path) -> None:
    edit_config(llama, tie_word_embeddings=True)
    edit_tensors(llama, **{EMBEDDING: None})
    torch.testing.assert_close(load_model(llama).logits(IDS), reference(llama), rtol=0, atol=1e-4)


def test_no_head_and_a_config_that_says_nothing_is_a_tied_one(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_tensors(llama, **{HEAD: None})
    edit_config(llama, tie_word_embeddings=None)
    silent = load_model(llama).logits(IDS)
    assert HEAD in caplog.text
    edit_config(llama, tie_word_embeddings=True)
    assert torch.equal(load_model(llama).logits(IDS), silent)


def test_no_head_in_a_model_that_is_not_tied_stays_an_error(llama: Path) -> None:
    """transformers makes one up: noise in, noise out."""
    edit_tensors(llama, **{HEAD: None})
    edit_config(llama, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=f"missing: {HEAD}"):
        load_model(llama)


def test_neither_head_nor_embedding_is_an_error_whatever_the_config_says(llama: Path) -> None:
    edit_tensors(llama, **{HEAD: None, EMBEDDING: None})
    for tie in (True, False, None):
        edit_config(llama, tie_word_embeddings=tie)
        with pytest.raises(CheckpointError, match=f"missing: {EMBEDDING}"):
            load_model(llama)


OURO = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "total_ut_steps": 3,
    "max_position_embeddings": 64,
}
GATE = "model.early_exit_gate"


@pytest.fixture
def ouro(tmp_path: Path) -> Path:
    """Random weights under the names of an Ouro."""
    save_checkpoint(tiny_model(num_kv_heads=4), tmp_path, torch.float32)
    (tmp_path / "config.json").write_text("{}")
    edit_config(tmp_path, **OURO)
    norms = {
        f"model.layers.{i}.{name}_layernorm_2.weight": torch.rand(32)
        for i in range(2)
        for name in ("input", "post_attention")
    }
    edit_tensors(tmp_path, **norms, **{f"{GATE}.weight": torch.rand(1, 32), f"{GATE}.bias": torch.rand(1)})
    return tmp_path


def test_an_ouro_without_its_gate_says_the_same(ouro: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = load_model(ouro)
    assert len(whole.gate_logits(IDS)) == 3
    edit_tensors(ouro, **{f"{GATE}.weight": None, f"{GATE}.bias": None})
    without = load_model(ouro)
    assert torch.equal(without.logits(IDS), whole.logits(IDS))
    assert "exit gate" in caplog.text
    with pytest.raises(ValueError, match="no exit gate"):
        without.gate_logits(IDS)


def test_half_a_gate_is_an_error(ouro: Path) -> None:
    edit_tensors(ouro, **{f"{GATE}.bias": None})
    with pytest.raises(CheckpointError, match=f"missing: {GATE}.bias"):
        load_model(ouro)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("model.", "model._orig_mod.", 1),
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_names_of_a_wrapped_model(tmp_path: Path, wrapped: Callable[[str], str], int8: bool) -> None:
    save_checkpoint(tiny_model(), tmp_path, torch.float32, int8=int8)
    wanted = load_model(tmp_path).logits(IDS)
    file = tmp_path / "model.safetensors"
    save_file({wrapped(name): tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(load_model(tmp_path).logits(IDS), wanted)


def test_two_names_for_one_tensor_are_an_error(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path, torch.float32)
    edit_tensors(tmp_path, **{"_orig_mod.model.norm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"_orig_mod\.model\.norm\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path: Path, name: str) -> None:
    save_checkpoint(tiny_model(), tmp_path, torch.float32)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c\nsize 135\n"
    )
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull") as caught:
        load_model(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_odd_ending_tokens_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tiny_model(eos_token_ids=(2,)), tmp_path, torch.float32)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, "</s>", -1]}')
    with caplog.at_level(logging.WARNING):
        assert load_model(tmp_path).config.eos_token_ids == (2, 7)
    assert "'</s>'" in caplog.text
