"""Every golden folder, at every depth, within the tolerance it states; through the engine as well.

The vectors lie in shared/golden beside the repository. Tests are skipped where they don't.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import LoadedModel, load_model
from model.engine import Engine
from model.options import EngineOptions
from model.protocol import GenerationRequest, SamplingParams

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
FOLDERS = sorted(f for f in GOLDEN.glob("*") if f.is_dir())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name, scope="module")
def golden(request):
    expected = json.loads((request.param / "expected.json").read_text())
    return load_model(request.param), expected, load_file(request.param / "expected.safetensors")


def test_vectors_are_there():
    """Without this, a moved folder would turn the tests below into nothing."""
    if not GOLDEN.is_dir():
        pytest.skip("no shared/golden beside the repository")
    assert len(FOLDERS) >= 12


def modes(tensors):
    """(suffix of the expected tensors, prefix of the greedy ones, initial state) of every kind of start."""
    yield "", "greedy", None
    if "initial_state" in tensors:
        yield "_state", "greedy_state", tensors["initial_state"]


def worst(loaded: LoadedModel, ids, depth, state, wanted) -> float:
    return (loaded.logits(ids, depth, state) - wanted).abs().max().item()


def test_logits_at_every_depth(golden):
    loaded, expected, tensors = golden
    limit = expected["tolerance"]["suggested_logit_atol"]
    for suffix, _, state in modes(tensors):
        for name, ids in expected["prompts"].items():
            for depth, wanted in enumerate(tensors[f"logits{suffix}.{name}"], start=1):
                assert worst(loaded, ids, depth, state, wanted) < limit


def test_default_depth_is_the_last(golden):
    loaded, expected, tensors = golden
    assert worst(loaded, expected["prompts"]["p1"], None, None, tensors["logits.p1"][-1]) < 5e-4


def test_state_between_loops(golden):
    """What a loop hands to the next one: the engine keeps and speculates on this very tensor."""
    loaded, expected, tensors = golden
    for name, ids in expected["prompts"].items():
        states = torch.cat(loaded.model.depths(torch.tensor([ids])))
        assert (states - tensors[f"loop_state.{name}"]).abs().max() < 5e-4


def test_exit_gate(golden):
    loaded, expected, tensors = golden
    for name, ids in expected["prompts"].items():
        if f"gate_logits.{name}" in tensors:
            assert (loaded.gate_logits(ids) - tensors[f"gate_logits.{name}"]).abs().max() < 5e-4
        else:
            with pytest.raises(ValueError, match="no exit gate"):
                loaded.gate_logits(ids)


def test_greedy_continuations(golden):
    """All 64 ids: each is the argmax after the ones before it, so by induction decoding gives the same."""
    loaded, expected, tensors = golden
    for _, key, state in modes(tensors):
        for name, prompt in expected["prompts"].items():
            for depth in range(1, expected["loops"] + 1):
                wanted = expected[key][name][f"depth_{depth}"]
                logits = loaded.logits((prompt + wanted)[:-1], depth, state)
                assert logits[len(prompt) - 1 :].argmax(-1).tolist() == wanted


def continuations(loaded: LoadedModel, expected, draft_depths, names, together: bool) -> dict[str, list[int]]:
    """What the engine makes of prompts at depths: one request after the other, or all at once."""
    requests = [
        GenerationRequest(
            request_id=name,
            prompt_token_ids=expected["prompts"][name.split()[0]],
            max_tokens=expected["new_tokens"],
            num_loops=int(name.split("_")[1]),
            ignore_eos=True,
            sampling=SamplingParams(temperature=0),
        )
        for name in names
    ]
    limits = {"max_num_seqs": 8, "prefill_chunk_size": 16, "prefill_rows": 64}
    config = EngineOptions(draft_depths=draft_depths, max_model_len=128, kv_cache_tokens=1024, **limits)
    engine = Engine(loaded.model, config)
    batches = [requests] if together else [[request] for request in requests]
    events = {name: found for batch in batches for name, found in engine.run(batch).items()}
    engine.check_integrity()
    return {name: [t for event in found for t in event.token_ids] for name, found in events.items()}


def wanted_continuations(expected, depths) -> dict[str, list[int]]:
    return {f"{name} depth_{d}": by[f"depth_{d}"] for name, by in expected["greedy"].items() for d in depths}


@pytest.mark.parametrize("drafts", ["none", "default", "all"])
def test_greedy_continuations_through_the_engine_all_depths_in_one_batch(golden, drafts):
    """Pages, waves, chunks of a prompt that crosses IQuest's window: the ids of the reference, none else."""
    loaded, expected, _ = golden
    depths = {"none": (), "default": None, "all": tuple(range(1, expected["loops"]))}[drafts]
    wanted = wanted_continuations(expected, range(1, expected["loops"] + 1))
    assert continuations(loaded, expected, depths, wanted, together=True) == wanted


def test_greedy_continuations_through_the_engine_one_after_the_other(golden):
    loaded, expected, _ = golden
    wanted = wanted_continuations(expected, [expected["loops"]])
    assert continuations(loaded, expected, None, wanted, together=False) == wanted
