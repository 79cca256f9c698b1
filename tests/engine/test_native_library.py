"""The native library against the torch reference, and against itself: a row's bits are its own."""

import copy
import json
import struct
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from model import LoadedModel, load_model
from model.engine import Engine
from model.network.config import ACTIVATIONS as NAMES
from model.network.config import RopeConfig
from model.network.int4 import round_linears_to_int4
from model.network.int8 import quantize_linears
from model.network.looped import LoopedTransformer
from model.options import EngineOptions
from model.passes.native import library, structs
from model.passes.native.backend import NativeOptions, NativePasses, RowArrays
from model.passes.native.library import NativeUnavailableError
from model.passes.native.loops import HeadRows
from model.passes.native.weights import ACTIVATIONS
from model.protocol import GenerationRequest, SamplingParams
from tests.engine.native_tools import LEVELS, POSITIONS, Text, passes_for, step, whole_logits
from tests.engine.test_golden import Golden, modes, source_of
from tests.golden import golden_folders, is_covered
from tests.loose import Field
from tests.tiny_models import SHAPES, source_model, tiny_model

pytestmark = pytest.mark.native
Schedule = tuple[list[tuple[list[int], list[int], list[int], list[int]]], Random]
COVERED = [folder for folder in golden_folders() if is_covered(folder)]
WEIGHTS = ("fp32", "bf16", "int8", "int4")
ALL_LEVELS = pytest.mark.parametrize("level", [level.name for level in LEVELS])


def held(model: LoopedTransformer, weights: str) -> tuple[LoopedTransformer, dict[str, Field]]:
    """A copy of the model that holds its matrices in this way, and the options for it."""
    model = copy.deepcopy(model)
    if weights == "int8":
        quantize_linears(model)
    return model.to(torch.bfloat16) if weights == "bf16" else model, {"int4": weights == "int4"}


def widened(model: LoopedTransformer, weights: str) -> LoopedTransformer:
    """The reference: the same numbers in fp32."""
    model = copy.deepcopy(model)
    if weights == "bf16":
        return model.to(torch.bfloat16).float()
    if weights == "int8":
        quantize_linears(model)
    if weights == "int4":
        round_linears_to_int4(model)
    return model


@pytest.fixture(params=COVERED, ids=lambda folder: folder.name, scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    expected = json.loads((request.param / "expected.json").read_text())
    return load_model(request.param), expected, load_file(request.param / "expected.safetensors")


@ALL_LEVELS
def test_golden_logits_at_every_depth(golden: Golden, level: str) -> None:
    loaded, expected, tensors = golden
    passes = passes_for(loaded.model, level=level)
    limit = expected["tolerance"]["suggested_logit_atol"]
    for suffix, _, state in modes(tensors):
        for name, ids in expected["prompts"].items():
            for depth, wanted in enumerate(tensors[f"logits{suffix}.{name}"], start=1):
                start = None if state is None else state.numpy()
                source = source_of(expected, name) or []
                found = whole_logits(passes, ids, depth, start, source=source)
                assert np.abs(found - wanted.numpy()).max() < limit


@ALL_LEVELS
@pytest.mark.parametrize("weights", WEIGHTS[1:])
def test_golden_models_in_fewer_bits(golden: Golden, weights: str, level: str) -> None:
    """The library's weights against the same weights widened to fp32.

    For int8 and int4 activations are rounded as well, to 1 / 32258 of a row's largest: that moves a logit by
    3.6e-3 at most (measured); with the low byte of the activations lost it would be a hundred times more.
    """
    limit = 5e-4 if weights == "bf16" else 1e-2
    loaded, expected, _ = golden
    model, options = held(loaded.model, weights)
    passes, reference = passes_for(model, level=level, **options), widened(loaded.model, weights)
    for name, ids in expected["prompts"].items():
        source = source_of(expected, name)
        for depth in range(1, expected["loops"] + 1):
            wanted = LoadedModel(reference, loaded.config).logits(ids, depth, encoder_ids=source).numpy()
            assert np.abs(whole_logits(passes, ids, depth, source=source or []) - wanted).max() < limit


def test_keys_and_values_in_fp16(golden: Golden) -> None:
    """What 11 bits of K/V move a logit by: 0.02 at most, and 0.044 in the two stacks of HRM."""
    loaded, expected, _ = golden
    loops = expected["loops"]
    limit = 6e-2 if loaded.config.family == "hrm_text" else 2e-2
    full, half = passes_for(loaded.model), passes_for(loaded.model, kv_dtype="float16")
    for name, ids in expected["prompts"].items():
        source = source_of(expected, name) or []
        wanted = whole_logits(full, ids, loops, source=source)
        assert 0 < np.abs(whole_logits(half, ids, loops, source=source) - wanted).max() < limit


@pytest.mark.parametrize("activation", sorted(NAMES))
def test_every_activation(activation: str) -> None:
    model = tiny_model(activation=activation)
    ids = list(range(40))
    wanted = LoadedModel(model, model.config).logits(ids).numpy()
    assert np.abs(whole_logits(passes_for(model), ids, 3) - wanted).max() < 2e-4
    assert ACTIVATIONS.keys() == NAMES


@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 16, "hidden_size": 40, "intermediate_size": 50, "vocab_size": 77},
        {"head_dim": 18, "num_heads": 6, "num_kv_heads": 1, "rope": RopeConfig(rotary_dim=10)},
        {"head_dim": 64, "num_heads": 3, "num_kv_heads": 1, "rope": RopeConfig(interleaved=True)},
        {"head_dim": 32, "qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_bias": True},
        {"hidden_size": 600, "intermediate_size": 1100, "head_dim": 32},
    ],
    ids=["ragged", "odd_group", "blocks", "biases", "wide"],
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_odd_sizes(shape: dict[str, Field], weights: str) -> None:
    base = tiny_model(2, **shape)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        elif shape.get("hidden_size", 0) > 500 and parameter.ndim == 2:
            parameter.mul_(0.1)
    model, options = held(base, weights)
    ids = [token % base.config.vocab_size for token in range(50)]
    wanted = LoadedModel(widened(base, weights), base.config).logits(ids).numpy()
    got = whole_logits(passes_for(model, **options), ids, base.config.num_loops)
    assert np.abs(got - wanted).max() < 2e-3 * max(1.0, np.abs(wanted).max())


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Texts on scattered pages, cut into chunks, and which of them run in each pass; a source for each."""
    pages = draw(st.permutations(range(64)))
    texts = []
    for index in range(draw(st.integers(1, 4))):
        chunks = draw(st.lists(st.integers(1, 21), min_size=1, max_size=4))
        tokens = draw(st.lists(st.integers(0, 60), min_size=sum(chunks), max_size=sum(chunks)))
        source = draw(st.lists(st.integers(0, 60), min_size=1, max_size=40))
        texts.append((tokens, list(pages[index * 12 : index * 12 + 12]), chunks, source))
    return texts, draw(st.randoms(use_true_random=False))


EXACT_SHAPES = (
    "pre_norm",
    "prelude_and_coda",
    "first_loop_gate",
    "skipped_adapter",
    "two_stacks_both_ways",
    "behind_an_encoder",
)
PASSES: dict[tuple[str, str, int], NativePasses] = {}


def kept_passes(shape: str, weights: str, threads: int) -> NativePasses:
    if (shape, weights, threads) not in PASSES:
        base = source_model(3) if shape == "behind_an_encoder" else tiny_model(3, **SHAPES[shape])
        model, options = held(base, weights)
        PASSES[shape, weights, threads] = passes_for(model, threads=threads, **options)
    return PASSES[shape, weights, threads]


@pytest.mark.parametrize("weights", WEIGHTS)
@settings(max_examples=25, deadline=None)
@given(schedule=schedules(), shape=st.sampled_from(EXACT_SHAPES), threads=st.integers(1, 3))
def test_bits_of_a_row_are_its_own(weights: str, schedule: Schedule, shape: str, threads: int) -> None:
    """Alone in one piece, or in chunks among others, on other pages, by other threads: the same bits."""
    drawn, random = schedule
    alone, together = kept_passes(shape, weights, 1), kept_passes(shape, weights, threads)
    loops = alone.config.num_loops
    has_source = alone.config.encoder is not None
    texts = [
        Text(
            tokens,
            pages[:9],
            chunks,
            loops,
            prefix=chunks[0] if alone.config.prefix_lm else 0,
            source=source if has_source else [],
            source_pages=pages[9:] if has_source else [],
        )
        for tokens, pages, chunks, source in drawn
    ]
    while running := [text for text in texts if not text.is_read]:
        step(together, random.sample(running, random.randint(1, len(running))))
    for text in texts:
        wanted = whole_logits(alone, text.tokens, loops, prefix=text.prefix, source=text.source)
        assert (np.concatenate(text.logits) == wanted).all()


# ---- through the engine ------------------------------------------------------------------------------------


def requests(
    model: LoopedTransformer, count: int, speculation: bool, temperature: float, **fields: Field
) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(count)
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=torch.randint(
                model.config.vocab_size, (3 + 7 * index,), generator=generator
            ).tolist(),
            max_tokens=24,
            ignore_eos=True,
            speculation=speculation,
            sampling=SamplingParams(temperature=temperature, top_p=0.95, seed=index),
            **fields,
        )
        for index in range(count)
    ]


def engine_for(model: LoopedTransformer, native: NativeOptions | None) -> Engine:
    return Engine(model, EngineOptions(max_model_len=POSITIONS, kv_cache_tokens=2048), maker=native)


def texts_of(engine: Engine, wanted: list[GenerationRequest]) -> dict[str, list[int]]:
    events = engine.run(wanted)
    engine.check_integrity()
    return {name: [token for event in found for token in event.token_ids] for name, found in events.items()}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", ["pre_norm", "prelude_and_coda", "first_loop_gate", "two_stacks_both_ways"])
def test_speculation_changes_nothing(shape: str, weights: str, temperature: float) -> None:
    model, options = held(tiny_model(4, **SHAPES[shape]), weights)
    engine = engine_for(model, NativeOptions(threads=2, **options))
    plain: dict[str, list[int]] = {}
    for request in requests(model, 6, False, temperature):
        plain |= texts_of(engine, [request])
    assert texts_of(engine, requests(model, 6, True, temperature)) == plain
    assert len({tuple(text) for text in plain.values()}) > 1


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_output_that_is_no_number_is_a_fault_of_its_own_sequence(weights: str, number: float) -> None:
    """Whole numbers must not hide it: int8 and int4 products of such a row would be finite."""
    base = tiny_model(4)
    base.embedding.weight[60] = number
    model, options = held(base, weights)
    asked = [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=[1, 2, last],
            max_tokens=1,
            sampling=SamplingParams(temperature=0),
        )
        for index, last in enumerate((3, 60, 4))
    ]
    events = engine_for(model, NativeOptions(threads=1, **options)).run(asked)
    assert [events[str(index)][-1].finish_reason for index in range(3)] == ["length", "error", "length"]
    assert "not a number" in (events["1"][-1].error or "")


# ---- what can't be run is said ---------------------------------------------------------------------------


def test_odd_head_dim_is_refused() -> None:
    with pytest.raises(NativeUnavailableError, match="head_dim is 9"):
        passes_for(tiny_model(head_dim=9, rope=RopeConfig(rotary_dim=8)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 2**24 + 1, "vocab_size is 16777217"),
        ("head_dim", 9, "head_dim is 9"),
        ("rotary_dim", 3, "rotary_dim is 3"),
        ("num_kv_heads", 3, "num_heads 4 is no multiple of num_kv_heads 3"),
        ("hidden_size", 33, "head has 32 inputs"),
        ("intermediate_size", 64, "gate_up has 32 inputs and 6 blocks"),
        ("activation", 99, "activation is 99"),
        ("norm", None, "a part of the model is missing"),
        ("max_positions", 0, "max_positions is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(field: str, value: int | None, message: str) -> None:
    passes = passes_for(tiny_model())
    setattr(passes.packed.description, field, value)
    setup = structs.Setup(num_threads=1, num_pages=1, cache=64, states=64)
    error = passes._error
    assert not passes.library.speed_open(passes.packed.description, setup, error, len(error))
    assert message in error.value.decode()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", 61, "token is 61; 0 to 60"),
        ("tokens", -1, "token is -1"),
        ("positions", POSITIONS, "position is 128; 0 to 127"),
        ("positions", 16, "page table is 0; 0 to -1"),
        ("loops", 3, "loop is 3; 0 to 2"),
        ("tables", 1, "page table is 1"),
        ("pages", 64, "page is 64; 0 to 63"),
        ("lasts", -1, "last position is -1; 0 to 127"),
        ("lasts", POSITIONS, "last position is 128; 0 to 127"),
        ("lasts", 16, "page table is 0; 0 to -1"),
    ],
)
def test_rows_out_of_range_are_refused(field: str, value: int, message: str) -> None:
    passes = passes_for(tiny_model())
    text = Text([1], [0], [1], 1)
    step(passes, [text])
    wrong: dict[str, Field] = {
        name: np.array([0], np.int32) for name in ("tokens", "positions", "loops", "tables", "pages")
    }
    rows = RowArrays(**{**wrong, field: np.array([value], np.int32)}, ends=np.array([0], np.uint8))
    nothing = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match=message):
        passes.run(rows, nothing, nothing)


@pytest.mark.parametrize(
    ("readout", "kept", "coda", "message"),
    [
        (2, [], False, "readout is 2; 0 to 1"),
        (0, [1], False, "kept row is 1; 0 to 0"),
        (0, [-1], False, "kept row is -1"),
        (1, [0], True, "row 0 is read out but runs no coda"),
    ],
)
def test_inputs_of_the_head_out_of_range_are_refused(
    readout: int, kept: list[int], coda: bool, message: str
) -> None:
    """One row, and one input of an earlier pass, which is readout 1."""
    passes = passes_for(tiny_model(num_coda_layers=int(coda)))
    one = np.array([0], np.int32)
    rows = RowArrays(one, one, one, one, one, np.array([0], np.uint8))
    head = HeadRows(kept, np.zeros((1, 32), np.float32))
    with pytest.raises(ValueError, match=message):
        passes.run(rows, [readout], [-1], head)


def test_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library.load.cache_clear()
    monkeypatch.setattr(structs, "SIZES", [size + 8 for size in structs.SIZES])
    with pytest.raises(NativeUnavailableError, match="compile it again"):
        library.load(LEVELS[0])
    library.load.cache_clear()


def test_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.load.cache_clear()
    LEVELS[0].path.write_bytes(struct.pack("<4sQ", b"\x7fELF", 0))
    with pytest.raises(NativeUnavailableError, match="is of no use"):
        library.load(LEVELS[0])
    library.load.cache_clear()


def test_levels_are_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "portable")
    if any(level.name == "portable" for level in LEVELS):
        assert library.choose().name == "portable"
    for wrong, message in (("0", "SPEED_NATIVE is 0"), ("sse9", "level 'sse9' is not known")):
        monkeypatch.setenv(library.VARIABLE, wrong)
        with pytest.raises(NativeUnavailableError, match=message):
            library.choose()
