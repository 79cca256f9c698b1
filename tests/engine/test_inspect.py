"""`speed inspect`: sizes as they are, passes to expect as they come, wrong checkpoints as one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli.main import main
from model import save_checkpoint
from model.engine import Engine
from model.network.int8 import quantize_linears
from model.options import EngineOptions
from model.protocol import GenerationRequest, SamplingParams
from model.study.quality import decode_prompts, draft_candidates, expected_passes, judge_text
from tests.engine.native_tools import MAKER
from tests.loose import Json
from tests.text_tools import byte_tokenizer
from tests.tiny_models import SHAPES, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tiny_model(num_loops=4, vocab_size=257), tmp_path, torch.float32)
    return tmp_path


def inspected(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Json]:
    assert main(["inspect", *map(str, argv), "--json"]) == 0
    report: dict[str, Json] = json.loads(capsys.readouterr().out)
    return report


def test_facts_are_those_of_the_model_and_need_no_weights(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.study.facts.load_model", None)
    facts = inspected(capsys, folder, "--backend", "torch")
    model = tiny_model(num_loops=4, vocab_size=257)
    stored = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.layers.parameters())
    assert facts["parameters_stored"] == stored
    assert facts["parameters_effective"] == stored + 3 * block
    assert facts["weight_bytes"] == 4 * stored
    assert facts["kv_slots"] == 8
    assert facts["kv_bytes_per_token"] == 8 * 2 * 2 * 8 * 4
    assert facts["full_contexts"] == facts["cache_tokens"] // 128 > 0
    assert facts["draft_depths"] == [1, 2]


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [False, True])
def test_weight_bytes_are_those_in_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quantization: str, dtype: str, tie: bool
) -> None:
    model = tiny_model(tie_embeddings=tie).to(getattr(torch, dtype))
    save_checkpoint(model, tmp_path, model.dtype)
    facts = inspected(capsys, tmp_path, "--dtype", dtype, "--quantization", quantization)
    if quantization == "int8":
        for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]:
            parent, _, child = name.rpartition(".")
            int8 = torch.nn.Module()
            int8.register_buffer("weight", linear.weight.to(torch.int8))
            int8.register_buffer("scales", linear.weight[:, 0].float())
            setattr(model.get_submodule(parent), child, int8)
    assert facts["weight_bytes"] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("shape", ["pre_norm", "sandwich", "norm_after_loop", "one_kv_head"])
@pytest.mark.parametrize("drafts", [(1,), (1, 2), (2,)])
def test_the_passes_to_expect_are_the_passes_that_decoding_takes(shape: str, drafts: tuple[int, ...]) -> None:
    """Teacher forcing over the text that the model itself wrote, against the engine that wrote it."""
    model, count = tiny_model(**SHAPES[shape]), 80
    engine = Engine(model, EngineOptions(draft_depths=drafts, draft_policy="recheck", kv_cache_tokens=256))
    prompt = [3, 1, 4, 1, 5]
    request = GenerationRequest(
        request_id="x",
        prompt_token_ids=prompt,
        max_tokens=count,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
    )
    events = engine.run([request])["x"]
    ids = torch.tensor([prompt + [token for event in events for token in event.token_ids]])
    with torch.inference_mode():
        readouts = [model.whole_readout(state)[0] for state in model.depths(ids)]
    predictions = torch.stack([logits[len(prompt) - 1 : -1].argmax(-1) for logits in readouts])
    expected = expected_passes(predictions, drafts)
    assert 1 < expected <= model.config.num_loops
    stats = events[-1].stats
    assert stats is not None
    assert abs(stats.passes - expected * count) <= 2 * model.config.num_loops  # to begin and to end


def test_no_early_depth_is_expected_to_help_where_none_agrees() -> None:
    predictions = torch.tensor([[1, 2, 3], [1, 5, 6], [7, 5, 3], [7, 5, 9]])
    assert expected_passes(predictions, (1,)) == 4
    assert expected_passes(predictions, (2,)) == (4 + 2 + 4) / 3
    assert expected_passes(predictions, (2, 3)) == (3 + 2 + 4) / 3
    assert expected_passes(predictions, ()) == 4
    assert list(draft_candidates(1)) == []
    assert list(draft_candidates(4)) == [(1, 2, 3), (1,), (2,), (1, 2)]
    assert (2, 8) in draft_candidates(32)


def test_loss_is_that_of_the_text_and_windows_are_read_on_their_own() -> None:
    model = tiny_model()
    ids = [int(i) for i in torch.randint(61, (41,), generator=torch.Generator().manual_seed(1))]
    quality = judge_text(model, ids, 16)
    assert quality.num_tokens == 40
    wanted = []
    for start in (0, 16, 32):
        part = torch.tensor([ids[start : start + 17]])
        logits = model.whole_readout(model.depths(part[:, :-1])[-1])[0]
        wanted += (-logits.log_softmax(-1).gather(1, part[0, 1:, None])).flatten().tolist()
    assert quality.loss == pytest.approx(sum(wanted) / 40, rel=1e-5)
    assert quality.depths[-1].agreement == 1
    with pytest.raises(ValueError, match="at least 2"):
        judge_text(model, [1], 16)


@pytest.mark.parametrize("quantization", ["int8", pytest.param("int4", marks=pytest.mark.native)])
def test_a_text_is_judged_before_and_after_quantisation_and_decoded(
    capsys: pytest.CaptureFixture[str], folder: Path, quantization: str
) -> None:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    options = [folder, "--text", text, "--window", 64, "--max-tokens", 300, "--draft-depths", "2"]
    report = inspected(capsys, *options, "--quantization", quantization)
    losses = [report[name]["depths"][-1]["loss"] for name in ("text", "text_quantized")]
    assert report["quantization_loss_change"] == losses[1] - losses[0] != 0
    assert report["text"]["num_tokens"] == 299
    assert report["decoding"]["draft_depths"] == [2]
    assert 1 < report["decoding"]["passes_per_token"] <= 4.2
    assert main(["inspect", *map(str, options)]) == 0
    shown = capsys.readouterr().out
    assert f"{losses[0]:.4f}" in shown
    assert "passes per token to expect" in shown


@pytest.mark.parametrize("quantization", ["none", "int8", pytest.param("int4", marks=pytest.mark.native)])
def test_a_text_is_judged_with_k_and_v_as_they_are_held(
    capsys: pytest.CaptureFixture[str], folder: Path, quantization: str
) -> None:
    """Against the same weights with K/V in full; fp32 changes nothing, int8 more than fp16."""
    text = folder / "ids.json"
    text.write_text(json.dumps([(5 * i * i) % 257 for i in range(300)]))
    changes, before = [], "text" if quantization == "none" else "text_quantized"
    for kv in ("float32", "float16", "int8"):
        options = [folder, "--text", text, "--quantization", quantization, "--kv-cache-dtype", kv]
        report = inspected(capsys, *options)
        losses = [depth["loss"] for depth in report[before]["depths"]]
        held = [depth["loss"] for depth in report["text_kv_cache_dtype"]["depths"]]
        changes.append(sum(abs(a - b) for a, b in zip(losses, held, strict=True)))
        change = report["kv_cache_dtype_change"]
        assert change["loss"] == held[-1] - losses[-1]
        assert change["same_tokens"] == 1 if kv == "float32" else 0.9 < change["same_tokens"] <= 1
        assert report["decoding"]["num_tokens"] > 0
    assert changes[0] == 0 < 4 * changes[1] < changes[2]
    assert main(["inspect", *map(str, options)]) == 0
    assert "K/V in int8 changes the held-out loss by" in capsys.readouterr().out


def test_ids_stand_for_a_text_where_there_is_no_tokenizer(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    text = folder / "ids.json"
    text.write_text(json.dumps(list(range(100))))
    assert inspected(capsys, folder, "--text", text)["text"]["num_tokens"] == 99
    text.write_text("words")
    assert main(["inspect", str(folder), "--text", str(text)]) == 2
    assert "JSON list of token ids" in capsys.readouterr().err


def test_decoding_works_on_quantised_weights() -> None:
    model = tiny_model()
    quantize_linears(model)
    for maker in (MAKER, None):
        assert decode_prompts(model, list(range(60)), None, 2, maker).num_tokens == 2 * 63


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text('{"architectures": ["BertModel"]}'), "BertModel"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40), "model.safetensors is damaged"),
    ],
)
def test_a_wrong_checkpoint_is_one_line_and_status_two(
    capsys: pytest.CaptureFixture[str], folder: Path, damage: Callable[[Path], object], part: str
) -> None:
    damage(folder)
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/no/such/folder"]) == 2
    assert "no folder '/no/such/folder'" in capsys.readouterr().err
