"""Every golden folder, at every depth, within the tolerance it states; through the engine as well.

The vectors lie in shared/golden and shared/golden-next beside the repository, the latter of families that
may not be served yet. Tests are skipped where they don't.
"""

import json
from collections.abc import Iterable, Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import LoadedModel, load_model
from model.engine import Engine
from model.options import EngineOptions
from model.passes.backend import BackendMaker
from model.protocol import GenerationRequest, SamplingParams
from tests.engine.native_tools import BACKENDS
from tests.golden import GOLDEN, golden_folders
from tests.loose import Field, Json

FOLDERS = golden_folders()
Golden = tuple[LoadedModel, Json, dict[str, Tensor]]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name, scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    expected = json.loads((request.param / "expected.json").read_text())
    return load_model(request.param), expected, load_file(request.param / "expected.safetensors")


def test_vectors_are_there() -> None:
    """Without this, a moved folder would turn the tests below into nothing."""
    if not GOLDEN.is_dir():
        pytest.skip("no shared/golden beside the repository")
    assert len(FOLDERS) >= 16


def modes(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor | None]]:
    """(suffix of the expected tensors, prefix of the greedy ones, initial state) of every kind of start."""
    yield "", "greedy", None
    if "initial_state" in tensors:
        yield "_state", "greedy_state", tensors["initial_state"]


def source_of(expected: Json, name: str) -> list[int] | None:
    """What the encoder reads beside the prompt of this name."""
    source: list[int] | None = expected["sources"][name] if expected.get("encoder_decoder") else None
    return source


def worst(
    loaded: LoadedModel,
    ids: list[int],
    depth: int | None,
    state: Tensor | None,
    wanted: Tensor,
    source: list[int] | None,
) -> float:
    return float((loaded.logits(ids, depth, state, encoder_ids=source) - wanted).abs().max())


def test_logits_at_every_depth(golden: Golden) -> None:
    loaded, expected, tensors = golden
    limit = expected["tolerance"]["suggested_logit_atol"]
    for suffix, _, state in modes(tensors):
        for name, ids in expected["prompts"].items():
            for depth, wanted in enumerate(tensors[f"logits{suffix}.{name}"], start=1):
                assert worst(loaded, ids, depth, state, wanted, source_of(expected, name)) < limit


def test_default_depth_is_the_last(golden: Golden) -> None:
    loaded, expected, tensors = golden
    prompt, wanted = expected["prompts"]["p1"], tensors["logits.p1"][-1]
    assert worst(loaded, prompt, None, None, wanted, source_of(expected, "p1")) < 5e-4


def test_state_between_loops(golden: Golden) -> None:
    """What a loop hands to the next one: the engine keeps and speculates on this very tensor."""
    loaded, expected, tensors = golden
    for name, ids in expected["prompts"].items():
        prefix = len(ids) if loaded.config.prefix_lm else 0
        given = source_of(expected, name)
        source = None if given is None else loaded.model.encode(torch.tensor([given]))
        states = torch.cat(loaded.model.depths(torch.tensor([ids]), prefix=prefix, source=source))
        if source is not None:
            assert (source.encoded[0] - tensors[f"encoder_state.{name}"]).abs().max() < 5e-4
        wanted = [
            tensors[f"{kind}.{name}"] for kind in ("loop_state", "low_state") if f"{kind}.{name}" in tensors
        ]
        assert (states - torch.cat(wanted, -1)).abs().max() < 5e-4


def test_exit_gate(golden: Golden) -> None:
    loaded, expected, tensors = golden
    for name, ids in expected["prompts"].items():
        if f"gate_logits.{name}" in tensors:
            assert (loaded.gate_logits(ids) - tensors[f"gate_logits.{name}"]).abs().max() < 5e-4
        else:
            with pytest.raises(ValueError, match="no exit gate"):
                loaded.gate_logits(ids)


def test_greedy_continuations(golden: Golden) -> None:
    """All 64 ids: each is the argmax after the ones before it, so by induction decoding gives the same."""
    loaded, expected, tensors = golden
    for _, key, state in modes(tensors):
        for name, prompt in expected["prompts"].items():
            for depth in range(1, expected["loops"] + 1):
                wanted = expected[key][name][f"depth_{depth}"]
                prefix = len(prompt) if loaded.config.prefix_lm else None
                source = source_of(expected, name)
                logits = loaded.logits((prompt + wanted)[:-1], depth, state, prefix, source)
                assert logits[len(prompt) - 1 :].argmax(-1).tolist() == wanted


def test_a_prompt_that_is_read_both_ways(golden: Golden) -> None:
    """The same ids with no token seeing ahead, and the prompt both ways with its text causally behind it."""
    loaded, expected, tensors = golden
    if not loaded.config.prefix_lm:
        if loaded.config.encoder:
            return
        with pytest.raises(ValueError, match="reads all causally"):
            loaded.logits([1, 2], prefix=2)
        return
    for name, ids in expected["prompts"].items():
        for depth, wanted in enumerate(tensors[f"logits_causal.{name}"], start=1):
            assert (loaded.logits(ids, depth, prefix=0) - wanted).abs().max() < 5e-4
        text = expected["greedy"][name][f"depth_{expected['loops']}"]
        found = loaded.logits(ids + text, prefix=len(ids))[len(ids) - 1 :]
        assert (found - tensors[f"logits_continued.{name}"]).abs().max() < 5e-4


def continuations(
    loaded: LoadedModel,
    expected: Json,
    draft_depths: tuple[int, ...] | None,
    names: Iterable[str],
    together: bool,
    maker: BackendMaker,
) -> dict[str, list[int]]:
    """What the engine makes of prompts at depths: one request after the other, or all at once."""
    behind_encoder = bool(expected.get("encoder_decoder"))
    kind = "sources" if behind_encoder else "prompts"
    requests = [
        GenerationRequest(
            request_id=name,
            prompt_token_ids=expected[kind][name.split()[0]],
            decoder_prompt=expected["prompts"][name.split()[0]][1:] if behind_encoder else [],
            max_tokens=expected["new_tokens"],
            num_loops=int(name.split("_")[1]),
            ignore_eos=True,
            sampling=SamplingParams(temperature=0),
        )
        for name in names
    ]
    limits: dict[str, Field] = {"max_num_seqs": 8, "prefill_chunk_size": 16, "prefill_rows": 64}
    config = EngineOptions(draft_depths=draft_depths, max_model_len=128, kv_cache_tokens=1024, **limits)
    engine = Engine(loaded.model, config, maker=maker)
    batches = [requests] if together else [[request] for request in requests]
    events = {name: found for batch in batches for name, found in engine.run(batch).items()}
    engine.check_integrity()
    return {name: [t for event in found for t in event.token_ids] for name, found in events.items()}


def wanted_continuations(expected: Json, depths: Iterable[int]) -> dict[str, list[int]]:
    return {f"{name} depth_{d}": by[f"depth_{d}"] for name, by in expected["greedy"].items() for d in depths}


@pytest.mark.parametrize("maker", BACKENDS)
@pytest.mark.parametrize("drafts", ["none", "default", "all"])
def test_greedy_continuations_through_the_engine_all_depths_in_one_batch(
    golden: Golden, drafts: str, maker: BackendMaker
) -> None:
    """Pages, waves, chunks of a prompt that crosses IQuest's window: the ids of the reference, none else."""
    loaded, expected, _ = golden
    depths = {"none": (), "default": None, "all": tuple(range(1, expected["loops"]))}[drafts]
    wanted = wanted_continuations(expected, range(1, expected["loops"] + 1))
    assert continuations(loaded, expected, depths, wanted, together=True, maker=maker) == wanted


@pytest.mark.parametrize("maker", BACKENDS)
def test_greedy_continuations_through_the_engine_one_after_the_other(
    golden: Golden, maker: BackendMaker
) -> None:
    loaded, expected, _ = golden
    wanted = wanted_continuations(expected, [expected["loops"]])
    assert continuations(loaded, expected, None, wanted, together=False, maker=maker) == wanted
