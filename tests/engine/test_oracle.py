"""`bench.oracle` on a tiny Dory: as many passes as the theory says, and texts that no draft changes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import oracle
from bench.make_checkpoint import PRESETS, write
from bench.oracle import Oracle, wrong_places
from model.passes.rows import Rows
from model.schedule.batch import PassResult, Readouts
from tests.loose import Json

SMALL: dict[str, object] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 8,
    "n_input_layers": 2,
    "n_recurrent_layers": 4,
    "n_output_layers": 2,
    "layer_types": PRESETS["dory-4b"]["layer_types"][:8],
    "sliding_window": 8,
    "max_position_embeddings": 512,
}
MAX_TOKENS = 13

Measure = Callable[..., tuple[int, Json]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dory")
    write(folder, {**PRESETS["dory-4b"], **SMALL}, torch.float32)
    return folder


@pytest.fixture
def measure(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """The command's exit status and what it wrote: two prompts, two loops as config.json says, and four."""

    def measured(*options: str) -> tuple[int, Json]:
        file = tmp_path / "results.json"
        fixed = ("--model", str(model), "--threads", "1", "--rounds", "1", "--loops", "2,4")
        sizes = ("--num-prompts", "2", "--prompt-tokens", "5", "--max-tokens", str(MAX_TOKENS))
        monkeypatch.setattr("sys.argv", ["bench", *fixed, *sizes, "--output", str(file), *options])
        status = oracle.main()
        return status, json.loads(file.read_text())

    return measured


@pytest.mark.parametrize("agreement", [1.0, 0.75, 0.0])
def test_a_wrong_draft_costs_the_loops_behind_the_first_and_no_text(
    agreement: float, measure: Measure
) -> None:
    status, said = measure("--agreement", str(agreement))
    assert status == 0
    assert said["wrong_drafts"] == round((1 - agreement) * said["drafts"])
    assert [(way["num_loops"], way["speculation"]) for way in said["ways"]] == [
        (2, False),
        (2, True),
        (4, False),
        (4, True),
    ]
    for way in said["ways"]:
        wrong = 1 - agreement if way["speculation"] else 1.0
        assert way["passes_per_token"] == pytest.approx(1 + (way["num_loops"] - 1) * wrong)
        assert way["texts_that_differ"] == 0


def test_requests_at_once_share_their_passes(measure: Measure) -> None:
    _, said = measure("--agreement", "1", "--requests", "2")
    for way in said["ways"]:
        num_loops = 1 if way["speculation"] else way["num_loops"]
        assert way["passes_per_token"] == pytest.approx(num_loops)
        if not way["speculation"]:
            assert way["rows_per_pass"] == 2
        else:
            assert way["rows_per_pass"] > 0.7 * 2 * way["num_loops"]


def test_a_last_loop_that_says_otherwise_is_told(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Oracle.run

    def wrong(self: Oracle, rows: Rows, readouts: Readouts) -> PassResult:
        result = run(self, rows, readouts)
        is_draft_there = any(not readout.is_final for readout in readouts.predicting)
        return result._replace(tokens=[0] * len(result.tokens)) if is_draft_there else result

    monkeypatch.setattr(Oracle, "run", wrong)
    status, said = measure()
    assert status == 1
    assert [way["texts_that_differ"] > 0 for way in said["ways"]] == [False, True, False, True]


def test_wrong_drafts_are_as_many_as_asked_and_drawn_by_the_seed() -> None:
    drawn = wrong_places(4, 26, 0.9, seed=1)
    assert sum(map(len, drawn)) == 10
    assert all(0 <= index < 25 for places in drawn for index in places)
    assert drawn == wrong_places(4, 26, 0.9, seed=1) != wrong_places(4, 26, 0.9, seed=2)
    assert len(set(drawn)) > 1
