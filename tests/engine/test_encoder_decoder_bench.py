"""Shared against unshared decoders, in the small: trained in slices, measured and reported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench import docstrings, encoder_decoder
from bench.docstrings import END, Example, Function, corpus_in, encode, read_functions
from bench.encoder_decoder import in_buckets, rouge_l
from bench.encoder_decoder_variants import DECODERS, Decoder, DocstringTask, batch_of, batches, recipe_of
from model import load_model
from training.recipe import Recipe, load_recipe
from training.trainer import Trainer, new_model

UNFINISHED = 3


@pytest.fixture
def recipe() -> Recipe:
    full = load_recipe(encoder_decoder.RECIPE)
    model = replace(
        full.model, vocab_size=300, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=2
    )
    stages = tuple(replace(stage, steps=1) for stage in full.stages[1:])
    return replace(full, model=model, stages=stages, tokens_per_step=256)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one function in each of many files; its docstring has the name of the file."""
    folder = tmp_path / "packages"
    for index in range(300):
        name = f"package_{index % 20}/module_{index}"
        text = f"Return {name}." + " And more." * (0, 12, 34)[index // 20 % 3]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(
            f'def call_{index}(x):\n    """{text}"""\n    return x + {index}\n'
        )
    monkeypatch.setattr(docstrings, "installed", lambda: [folder])
    return folder


def test_no_file_is_on_both_sides_and_no_docstring_in_its_source(packages: Path) -> None:
    (packages / "package_1" / "copy.py").write_text((packages / "package_1" / "module_1.py").read_text())
    (packages / "package_1" / "broken.py").write_text("def f(:\n")
    (packages / "package_1" / "terse.py").write_text('def f():\n    """Go."""\n')
    train, held_out = read_functions([packages])
    assert len(train) + len(held_out) == 300
    assert 0 < len(held_out) < 30
    assert not {function.text for function in train} & {function.text for function in held_out}
    for function in (*train, *held_out):
        assert function.text.startswith("Return package_")
        assert "Return" not in function.code
        assert "return x + " in function.code


def test_a_package_of_many_files_is_not_most_of_the_corpus(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docstrings, "MOST_FILES", 5)
    train, held_out = read_functions([packages])
    assert len(train) + len(held_out) == 5 * 20


def test_too_few_functions_are_said_to_be_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few functions"):
        read_functions([tmp_path])


def test_examples_end_with_the_end_token_and_keep_to_their_lengths(packages: Path, tmp_path: Path) -> None:
    corpus = corpus_in(tmp_path, 300, seed=1)
    assert corpus == corpus_in(tmp_path, 300, seed=2), "what is there is not made again"
    for example in (*corpus.train, *corpus.held_out):
        assert (example.source[-1], example.text[-1]) == (END, END)
        assert END not in example.source[:-1] + example.text[:-1]
        assert len(example.text) <= docstrings.LONGEST_TEXT
        assert len(example.source) <= docstrings.LONGEST_SOURCE
    tokenizer = Tokenizer.from_file(str(tmp_path / docstrings.TOKENIZER))
    long = Function("def f(): pass", "word " * 500)
    assert encode([long], tokenizer, 0) == []
    (short,) = encode([Function("x = 1\n" * 500, "Return the number one.")], tokenizer, 0)
    assert tokenizer.decode(short.text[:-1]) == "Return the number one."
    assert len(short.source) == docstrings.LONGEST_SOURCE


def examples(count: int) -> list[Example]:
    return [Example([5 + i % 7] * (1 + i % 50) + [END], [9 + i % 5] * (i % 90) + [END]) for i in range(count)]


def test_every_example_is_in_one_batch_that_keeps_to_its_size() -> None:
    made = batches(examples(500), 1024, seed=3)
    assert sorted(example for group in made for example in group) == sorted(examples(500))
    for group in made:
        batch = batch_of(group)
        assert batch.sources.numel() + batch.kept.numel() <= 1024
        for row, example in enumerate(group):
            assert batch.sources[row][batch.seen[row]].tolist() == example.source
            assert batch.texts[row, 1:][batch.kept[row]].tolist() == example.text
            assert batch.texts[row, 0] == END
    assert made != batches(examples(500), 1024, seed=4)


def test_the_decoders_differ_in_layers_and_loops_alone(recipe: Recipe) -> None:
    own = [recipe_of(recipe, decoder) for decoder in DECODERS]
    shapes = [(r.model.num_block_layers, r.model.num_loops) for r in own]
    assert shapes == [(2, 1), (4, 1), (12, 1), (2, 6), (4, 3)]
    for each in own:
        assert {stage.num_loops for stage in each.stages} == {each.model.num_loops}
        assert recipe_of(each, Decoder(2, 6)) == recipe_of(recipe, Decoder(2, 6))


def test_muon_has_the_matrices_of_both_sides(recipe: Recipe, tmp_path: Path) -> None:
    model = new_model(recipe)
    muon, adam = Trainer(recipe, DocstringTask([], recipe), tmp_path, model).optimizers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    others = {names[id(parameter)] for group in adam.param_groups for parameter in group["params"]}
    assert {name for name in others if "norm" not in name} == {
        "embedding.weight",
        "head.weight",
        "relative.weight",
        "encoder.relative.weight",
    }
    by_muon = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    assert by_muon == set(names.values()) - others


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [
        ("a b c", "a b c", 1.0),
        ("a x c", "a b c", 2 / 3),
        ("c b a", "a b c", 1 / 3),
        ("", "a", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_counts_words_in_order(found: str, wanted: str, score: float) -> None:
    assert rouge_l(found, wanted) == pytest.approx(score)


def test_the_buckets_are_by_the_tokens_before_the_end() -> None:
    given = [Example([END], [1] * length + [END]) for length in (15, 16, 64, 65, 14)]
    found = in_buckets(given, 2)
    lengths = {name: [len(example.text) - 1 for example in part] for name, part in found.items()}
    assert lengths == {"below 16": [15, 14], "16 to 64": [16, 64], "above 64": [65]}
    with pytest.raises(ValueError, match="above 64"):
        in_buckets(given[:2], 2)


def test_trained_in_slices_measured_and_reported(
    recipe: Recipe, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_decoder, "load_recipe", lambda _: recipe)
    monkeypatch.setattr(encoder_decoder, "LONGEST_TEXT", 12)
    monkeypatch.setattr(encoder_decoder, "DECODERS", (Decoder(1, 1), Decoder(2, 1), Decoder(1, 2)))
    runs, results = tmp_path / "runs", tmp_path / "results"

    def run(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["bench", *options, "--runs", str(runs), "--threads", "1"])
        return encoder_decoder.main()

    slices = 1
    while run("train", "--max-minutes", "0") == UNFINISHED:
        slices += 1
    assert slices == recipe.total_steps
    held_out = corpus_in(runs, 300, 0).held_out
    assert run("measure", "--num-texts", "2", "--rounds", "1", "--output", str(results)) == 0
    rows = json.loads((results / "encoder_decoder.json").read_text())
    ways = [("1", "none"), ("2", "none"), ("1 x 2", "none"), ("1 x 2", "recheck")]
    assert [(row["decoder"], row["policy"]) for row in rows] == ways
    for row, folder, loops in zip(rows, ("1x1", "2x1", "1x2", "1x2"), (1, 1, 2, 2), strict=True):
        assert len(row["loss"]) == loops
        model = load_model(runs / folder / "model").model
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        for bucket, figures in row["buckets"].items():
            assert figures["texts"] == figures["equal_to_plain"] == len(in_buckets(held_out, 2)[bucket])
            if row["policy"] == "none":
                assert figures["passes"] == loops * figures["tokens"]
                assert figures["guesses"] == 0
            else:
                assert figures["passes"] <= loops * figures["tokens"]
                assert figures["corrected"] <= figures["guesses"] <= figures["tokens"]
    page = (results / "encoder_decoder.md").read_text()
    assert [page.count(f"\n| {name} | ") for name in ("2", "1 x 2")] == [2, 5]
    assert "1 x 2" in (results / "encoder_decoder.svg").read_text()


def test_a_model_that_is_not_trained_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "measure", "--runs", str(tmp_path / "nowhere")])
    assert encoder_decoder.main() == 2
    assert str(tmp_path / "nowhere" / "2x1" / "model") in capsys.readouterr().err
