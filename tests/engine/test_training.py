"""Training on a corpus of a few files: it learns, it resumes exactly, and what it exports can be served."""

import argparse
import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from model import load_model
from training import main
from training import trainer as trainer_module
from training.checkpoints import DamagedCheckpointError, load_checkpoint, save_checkpoint
from training.corpus import is_held_out, read_corpus
from training.muon import Float32Muon, orthogonalised
from training.recipe import load_recipe, recipe_from
from training.text_task import TextTask
from training.trainer import Trainer, new_model

RECIPE = """
tokens_per_step = 64
matrix_learning_rate = 0.02
other_learning_rate = 0.01
weight_decay = 0.0
seed = 1
[model]
family = "nanbeige"
vocab_size = 300
hidden_size = 32
intermediate_size = 48
num_heads = 2
num_kv_heads = 1
head_dim = 16
num_block_layers = 1
num_loops = 3
max_positions = 1024
tie_embeddings = true
bos_token_id = 0
eos_token_ids = [0]
[[stages]]
steps = 6
num_loops = 1
sequence_length = 32
rates = [0.5, 1.0]
[[stages]]
steps = 6
num_loops = 3
sequence_length = 64
rates = [1.0, 0.0]
agreement_weight = 0.5
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(120):
        lines = [f"def function_{index}_{line}(x):\n    return x + {line}\n" for line in range(40)]
        (folder / f"module_{index}.py").write_text("".join(lines))
    return folder


def arguments(tmp_path: Path, corpus: Path, output: str, minutes: float) -> list[str]:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    paths = ["--recipe", str(recipe), "--corpus", str(corpus), "--output", str(tmp_path / output)]
    return [*paths, "--max-minutes", str(minutes), "--threads", "1"]


def train(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    main.add_arguments(parser)
    return main.run(parser.parse_args(arguments))


def test_a_run_in_slices_equals_a_run_in_one_and_exports_a_model_that_loads(
    tmp_path: Path, corpus: Path
) -> None:
    assert train(arguments(tmp_path, corpus, "whole", 10)) == 0
    slices = 0
    while train(arguments(tmp_path, corpus, "sliced", 0)) == main.UNFINISHED:
        slices += 1
    assert slices > 5
    whole, sliced = (load_model(tmp_path / name / "model") for name in ("whole", "sliced"))
    assert torch.equal(whole.logits([1, 2, 3]), sliced.logits([1, 2, 3]))
    config = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert (config["model_type"], config["skip_loop_final_norm"], config["num_loops"]) == (
        "nanbeige",
        True,
        3,
    )
    card = (tmp_path / "whole" / "model" / "README.md").read_text()
    assert "12 steps of 64 tokens" in card
    assert (tmp_path / "whole" / "model" / "tokenizer.json").exists()


def test_the_loss_falls_and_every_loop_has_one(tmp_path: Path, corpus: Path) -> None:
    train(arguments(tmp_path, corpus, "run", 0))
    recipe = load_recipe(tmp_path / "recipe.toml")
    tokens = np.load(tmp_path / "run" / "train.npy")
    trainer = Trainer(recipe, TextTask(tokens, recipe), tmp_path / "run", new_model(recipe))
    losses = [trainer.take_step().tolist() for _ in range(11)]
    assert len(losses[0]) == 1
    assert len(losses[-1]) == 3
    assert losses[-1][-1] < losses[0][0] - 0.5


def test_a_resumed_run_takes_the_learning_rates_of_the_recipe_as_it_is_now(
    tmp_path: Path, corpus: Path
) -> None:
    train(arguments(tmp_path, corpus, "run", 0))
    recipe = dataclasses.replace(
        load_recipe(tmp_path / "recipe.toml"), matrix_learning_rate=0.005, other_learning_rate=0.003
    )
    tokens = np.load(tmp_path / "run" / "train.npy")
    trainer = Trainer(recipe, TextTask(tokens, recipe), tmp_path / "run", new_model(recipe))
    assert trainer.step == 1
    trainer.take_step()
    _, rate = recipe.at(1)
    used = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert used == pytest.approx([0.005 * rate, 0.003 * rate])


def test_training_and_held_out_files_are_split_by_path_and_never_equal(corpus: Path) -> None:
    split = read_corpus(corpus)
    assert all(is_held_out(d.path) for d in split.held_out)
    assert not any(is_held_out(d.path) for d in split.train)
    copy = corpus / "copy_of_a_training_file.py"
    copy.write_text(split.train[0].text)
    again = read_corpus(corpus)
    texts = [d.text for d in again.train + again.held_out]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("shape", [(24, 72), (72, 24)])
def test_muon_in_fp32_is_torchs_but_for_bf16_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = Float32Muon([ours], lr=0.1, weight_decay=0.1, momentum=0.9)
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.9)
    for index, gradient in enumerate(gradients):
        if index == 3:  # a run may go on with the other one
            mine.load_state_dict(torchs.state_dict())
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.1 * moved  # rounding to bf16 moves the small singular values
    assert (ours - start).norm() > 0.9 * moved


def test_orthogonalised_singular_values_are_near_one() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(48, 16) @ torch.diag(torch.logspace(0, -2, 16))
    values = torch.linalg.svdvals(orthogonalised(matrix, (3.4445, -4.7750, 2.0315), 7, 1e-7))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("has_bf16", [False, True])
def test_training_uses_bf16_only_where_the_cpu_has_its_products(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(trainer_module, "multiplies_bf16", lambda device: has_bf16)
    train(arguments(tmp_path, corpus, "run", 0))
    recipe = load_recipe(tmp_path / "recipe.toml")
    tokens = np.load(tmp_path / "run" / "train.npy")
    trainer = Trainer(recipe, TextTask(tokens, recipe), tmp_path / "run", new_model(recipe))
    dtypes: set[torch.dtype] = set()
    for name in ("layers.0", "layers.0.attn.qkv_proj"):
        trainer.model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output: dtypes.add(output.dtype)
        )
    trainer.take_step()
    assert (torch.bfloat16 in dtypes) is has_bf16
    assert isinstance(trainer.optimizers[0], Float32Muon) is not has_bf16


def test_an_unknown_key_of_a_recipe_is_an_error(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("weight_decay", "weigth_decay"))
    with pytest.raises(TypeError, match="weigth_decay"):
        load_recipe(recipe)


def test_a_checkpoint_in_small_parts_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint({"step": step, "weights": torch.arange(5000.0) * step}, tmp_path, part_bytes=4096)
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 2
    assert torch.equal(state["weights"], torch.arange(5000.0) * 2)
    parts = sorted(tmp_path.glob("checkpoint-*/part-*"))
    assert len(parts) > 5
    assert all(part.stat().st_size <= 4096 for part in parts)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    parts[3].write_bytes(parts[3].read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedCheckpointError, match="part-003"):
        load_checkpoint(tmp_path)
    parts[3].unlink()
    with pytest.raises(DamagedCheckpointError, match="part-003"):
        load_checkpoint(tmp_path)


def test_a_recipe_says_how_large_embeddings_begin() -> None:
    recipe = recipe_from(tomllib.loads(RECIPE.replace("tie_embeddings = true", "tie_embeddings = false")))
    for std in (0.02, 2.0):
        model = new_model(dataclasses.replace(recipe, embedding_std=std))
        assert model.embedding.weight.std().item() == pytest.approx(std, rel=0.05)
        assert model.head.weight.std().item() < 0.1
