"""Looped against unshared depth, in the small: the same batches for all, and figures that add up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import depth_for_free, depth_variants
from bench.depth_for_free import Decoded, milliseconds
from bench.depth_report import Row, claims
from bench.depth_variants import Variant, recipe_of, variants
from model import load_model
from tests.loose import Field
from training.recipe import Recipe, load_recipe
from training.text_task import TextTask


@pytest.fixture
def recipe() -> Recipe:
    full = load_recipe(depth_for_free.RECIPE)
    small: dict[str, Field] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
    }
    model = replace(full.model, vocab_size=300, num_block_layers=2, **small)
    stages = tuple(replace(stage, steps=2, sequence_length=32) for stage in full.stages[1:])
    return replace(full, model=model, stages=stages, tokens_per_step=64)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(120):
        lines = [f"def function_{index}_{line}(x):\n    return x + {line}\n" for line in range(40)]
        (folder / f"module_{index}.py").write_text("".join(lines))
    monkeypatch.setattr(depth_variants, "standard_library", lambda: folder)
    return folder


def test_all_models_see_the_same_batches_at_the_same_rates(recipe: Recipe) -> None:
    chosen = variants([2], [2, 4])
    assert [v.name for v in chosen] == ["2x1", "2x2", "2x4", "4x1", "8x1"]
    own = [recipe_of(recipe, variant) for variant in chosen]
    tokens = torch.arange(1000).numpy().astype("uint16")
    for step in range(recipe.total_steps):
        stage, rate = own[0].at(step)
        for other in own[1:]:
            assert other.at(step)[1] == rate
            batches = [TextTask(tokens, r).batch(r.at(step)[0], step) for r in (own[0], other)]
            assert torch.equal(*batches)
    assert own[2].at(recipe.total_steps - 1)[0].num_loops == 4
    assert own[4].at(recipe.total_steps - 1)[0].num_loops == 1
    assert stage.num_loops == 1


def test_trained_in_slices_measured_and_reported(
    recipe: Recipe, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth_variants, "HELD_OUT_WINDOWS", 3)
    runs, results = tmp_path / "runs", tmp_path / "results"
    chosen = variants([2], [2])
    assert [v.name for v in chosen] == ["2x1", "2x2", "4x1"]
    slices = 0
    while not _trained(recipe, chosen, runs):
        slices += 1
    assert slices > 2
    monkeypatch.setattr(depth_for_free, "load_recipe", lambda _: recipe)
    monkeypatch.setattr(
        depth_for_free, "held_out_prompts", lambda _tokenizer, count, _length: [[7, 8, 9]] * count
    )
    options = ["measure", "--runs", str(runs), "--output", str(results), "--depths", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["bench", *options, "--num-prompts", "2", "--max-tokens", "6"])
    assert depth_for_free.main() == 0
    rows = json.loads((results / "depth_for_free.json").read_text())
    assert [(row["variant"], row["policy"]) for row in rows] == [
        ("2x1", "none"),
        ("2x1", "adaptive"),
        ("2x2", "none"),
        ("2x2", "recheck"),
        ("2x2", "adaptive"),
        ("4x1", "none"),
        ("4x1", "adaptive"),
    ]
    assert [row["passes_per_token"] for row in rows if row["policy"] == "none"] == [1.0, 2.0, 1.0]
    assert all(row["equal_texts"] == 1.0 for row in rows)
    stored = sum(p.numel() for p in load_model(runs / "2x2" / "model").model.parameters())
    assert [row["parameters"] for row in rows[:5]] == [stored] * 5
    assert (results / "depth_for_free.svg").read_text().count("2 x 2") >= 1
    assert (results / "depth_for_free.md").read_text().count(
        "| 2 x 2 | "
    ) == 5  # plain, SPEED, SPEED with n-grams, claim, changes


def test_blocks_of_several_sizes_share_their_unlooped_models() -> None:
    names = [variant.name for variant in variants([1, 2], [2, 4])]
    assert names == ["1x1", "1x2", "1x4", "2x1", "2x2", "2x4", "4x1", "8x1"]


def test_the_claims_are_ratios_to_the_same_block_run_once() -> None:
    def rows(layers: int, loops: int, loss: float, times: dict[str, float]) -> list[Row]:
        variant = Variant(layers, loops)
        return [Row(variant, policy, 1, [loss], [1.0], time, 1.0, 1.0) for policy, time in times.items()]

    two = rows(2, 1, 3.0, {"none": 2.0, "adaptive": 1.0})
    two += rows(2, 4, 2.7, {"none": 8.0, "recheck": 2.5, "adaptive": 1.5})
    assert claims(two)[0].share_of_gain is None
    assert claims(two[2:]) == []  # the block alone wasn't measured
    one = rows(1, 1, 4.0, {"none": 1.0, "adaptive": 0.5})
    one += rows(1, 2, 3.2, {"none": 2.0, "recheck": 1.5, "adaptive": 0.75})
    first, second = claims([*one, *two, *rows(8, 1, 2.6, {"none": 8.0, "adaptive": 4.0})])
    assert first == (Variant(1, 2), *map(pytest.approx, (2.0, 1.5, 0.75, 1.5, 0.8)))
    assert second == (Variant(2, 4), *map(pytest.approx, (4.0, 1.25, 0.75, 1.5, 0.75)))


@pytest.mark.parametrize(
    ("option", "value"),
    [("--only", "2x9"), ("--max-tokens", "1"), ("--rounds", "0"), ("--prompt-tokens", "400")],
)
def test_options_that_cannot_be_had_are_named_before_any_work(
    option: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = tmp_path / "runs"  # which isn't there
    monkeypatch.setattr("sys.argv", ["bench", "measure", "--runs", str(runs), option, value])
    with pytest.raises(SystemExit) as end:
        depth_for_free.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert option in said
    assert (value if option != "--prompt-tokens" else "528") in said


def test_the_time_is_of_all_prompts_together_and_a_slow_moment_counts_once() -> None:
    def rounds(*seconds: tuple[float, ...]) -> list[list[Decoded]]:
        return [[Decoded(each, 1.0, []) for each in per_round] for per_round in seconds]

    quiet = rounds((1.0, 3.0), (1.0, 3.0), (1.0, 3.0))
    disturbed = rounds((9.0, 3.0), (1.0, 3.0), (1.0, 30.0))
    assert milliseconds(quiet) == milliseconds(disturbed) == pytest.approx(2000.0)


def _trained(recipe: Recipe, chosen: list[Variant], runs: Path) -> bool:
    done = [depth_variants.train(recipe, variant, runs, 0) for variant in chosen]
    return all(done)
