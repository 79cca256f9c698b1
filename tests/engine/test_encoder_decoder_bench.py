"""`bench.encoder_decoder`: its scores, its batches, a training that stops and goes on, and its figures."""

from pathlib import Path

import pytest
import torch

from bench.docstrings import END, Example, encode, read_functions, train_tokenizer
from bench.encoder_decoder import (
    BATCH_TOKENS,
    Batch,
    Decoder,
    Run,
    answers,
    batches,
    held_out_loss,
    rouge_l,
)
from model.checkpoint.loader import load_model
from model.engine import Engine
from model.options import EngineOptions
from model.schedule.drafts import Experience


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [("a b c", "a b c", 1.0), ("a x c", "a b c", 2 / 3), ("c b a", "a b c", 1 / 3), ("", "a", 0.0)],
)
def test_rouge_l_counts_words_in_order(found: str, wanted: str, score: float) -> None:
    assert rouge_l(found, wanted) == pytest.approx(score)


def examples(count: int) -> list[Example]:
    return [Example([5 + i % 7] * (1 + i % 50), [9 + i % 5] * (i % 90) + [END]) for i in range(count)]


def test_every_example_is_in_one_batch_that_keeps_to_its_size() -> None:
    made = batches(examples(500))
    assert sorted(example for group in made for example in group) == sorted(examples(500))
    for group in made:
        batch = Batch.of(group)
        assert batch.sources.numel() + batch.texts.numel() <= BATCH_TOKENS or len(group) == 1
        assert (batch.targets != -100).sum() == sum(len(example.text) for example in group)


def test_a_training_that_stops_goes_on_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, order = Decoder("1 x 2", 1, 2), batches(examples(40))
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    Run(decoder, tmp_path / "whole", 4).go_on(order, 1e18)
    stopped = Run(decoder, tmp_path / "parts", 4)
    clock = iter([0.0, 0.0, 0.0, 2.0])  # it begins, looks, counts its step, and finds that time is up
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stopped.go_on(order, until=1.0)
    monkeypatch.undo()
    assert stopped.step == 1
    Run(decoder, tmp_path / "parts", 4).go_on(order, 1e18)
    whole, parts = (load_model(tmp_path / name).model for name in ("whole", "parts"))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)
    assert Run(decoder, tmp_path / "parts", 4).is_done
    assert held_out_loss(whole, examples(20)) > 0
    engine = Engine(whole, EngineOptions(kv_cache_tokens=1024, max_model_len=512))
    both = answers(engine, examples(3), Experience.none())
    assert [answer.tokens for answer in both[True]] == [answer.tokens for answer in both[False]]


def test_functions_and_their_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstring is in no source, and no file is on both sides."""
    for index in range(300):
        code = f'def call_{index}(x):\n    """Return number {index} of all."""\n    return x + {index}\n'
        (tmp_path / f"file_{index}.py").write_text(code)
    monkeypatch.setattr("bench.docstrings.PREFIXES", ("stdlib",))
    monkeypatch.setattr("bench.docstrings.MOST_FILES", 300)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    train, held_out = read_functions()
    assert len(train) + len(held_out) == 300
    assert 0 < len(held_out) < 30
    assert not {text for _, text in train} & {text for _, text in held_out}
    assert all(text.startswith("Return number") and "Return" not in code for code, text in train)
    tokenizer = train_tokenizer(train, 400)
    found = encode(train, tokenizer)
    assert len(found) == len(train)
    assert all(example.source[-1] == example.text[-1] == END for example in found)
    assert {tokenizer.decode(example.text).strip() for example in found} == {text for _, text in train}
