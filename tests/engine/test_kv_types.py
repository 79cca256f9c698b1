"""K/V in fewer bits: rounded once, the same by torch and natively, and exact like any other K/V."""

import copy
import functools
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from model import LoadedModel
from model.engine import Engine
from model.network.looped import LoopedTransformer
from model.options import EngineOptions, KVCacheDtypeName
from model.passes.kv import KV_DTYPES, head_bytes, read_back, to_int8
from model.passes.native.backend import NativeOptions, NativePasses
from model.passes.torch.backend import TorchMaker
from model.protocol import GenerationRequest, SamplingParams, TokenLogprobs
from tests.engine.native_tools import passes_for, whole_logits
from tests.loose import Field
from tests.tiny_models import SHAPES, source_model, tiny_model

NATIVE = pytest.mark.native
KV: tuple[KVCacheDtypeName, ...] = ("float32", "float16", "bfloat16", "int8")
FEWER = KV[1:]
IDS = [(7 * place) % 61 for place in range(75)]
# Beyond rounding that the reference does as well: a number between two steps may be rounded to the other one.
CLOSE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2, "int8": 1e-1}
Maker = NativeOptions | TorchMaker
Said = list[list[TokenLogprobs]]


def maker(backend: str, kv: KVCacheDtypeName) -> Maker:
    return TorchMaker(kv) if backend == "torch" else NativeOptions(threads=1, kv_dtype=kv)


def rounding(model: LoopedTransformer, kv: KVCacheDtypeName) -> LoopedTransformer:
    """The reference: whole sequences, of whose K and V is read what was held."""
    model = copy.deepcopy(model)
    model.read_back = functools.partial(read_back, dtype=KV_DTYPES[kv])
    return model


def engine(model: LoopedTransformer, maker: Maker, **fields: Field) -> Engine:
    options = EngineOptions(**{"kv_cache_tokens": 1024, "row_budget": 32, **fields})
    return Engine(model, options, maker=maker)


def requests(model: LoopedTransformer, speculation: bool, **fields: Field) -> list[GenerationRequest]:
    """Prompts that share their first two pages or hold less than one, half of them greedy."""
    behind = model.config.encoder is not None
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=[*IDS[: 40 if index % 3 else 5], index],
            decoder_prompt=IDS[: 3 * index] if behind else [],
            max_tokens=14,
            sampling=SamplingParams(temperature=index % 2, seed=index),
            ignore_eos=True,
            speculation=speculation,
            **{"logprobs": 2, **fields},
        )
        for index in range(6)
    ]


def said(engine: Engine, asked: list[GenerationRequest]) -> Said:
    """Every token with its scores, which hold its logits' last bits."""
    events = engine.run(asked)
    engine.check_integrity()
    return [[score for event in events[each.request_id] for score in event.logprobs] for each in asked]


def model_of(shape: str) -> LoopedTransformer:
    return source_model() if shape == "behind_a_source" else tiny_model(**SHAPES[shape])


@NATIVE
@pytest.mark.parametrize("kv", ["bfloat16", "int8"])  # in fp32 and fp16 other tests show it
@pytest.mark.parametrize("shape", [*SHAPES, "behind_a_source"])
def test_the_bits_of_a_text_are_its_own(shape: str, kv: KVCacheDtypeName) -> None:
    """Speculation on and off, alone and in a batch, prompts in chunks of 1, 7 and 64, found in the prefix
    cache, and read again after sequences made way."""
    model = model_of(shape)
    native = NativeOptions(threads=1, kv_dtype=kv)
    plain = engine(model, native, prefill_chunk_size=64, prefix_caching=False)
    expected = [said(plain, [each])[0] for each in requests(model, speculation=False)]
    assert len({tuple(score.token_id for score in scores) for scores in expected}) > 1
    for chunk in (1, 7, 64):
        batching = engine(model, native, prefill_chunk_size=chunk, prefill_rows=64)
        assert said(batching, requests(model, speculation=True)) == expected
        assert said(batching, requests(model, speculation=False)[3:]) == expected[3:]
        assert batching.stats.prefix_cache_hits > 0 or model.config.prefix_lm
    short = engine(
        model,
        native,
        kv_cache_tokens=80,
        max_model_len=80,
        prefill_chunk_size=13,
        row_budget=9,
        prefix_caching=False,
    )
    assert said(short, requests(model, speculation=True)) == expected
    assert short.stats.preemptions > 0 or model.config.encoder is not None


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
@pytest.mark.parametrize(
    ("shape", "kv"),
    [
        *product([*SHAPES, "behind_a_source"], ["int8"]),
        *product(["prelude_and_coda", "behind_a_source"], KV[:3]),
    ],
)
def test_every_type_means_the_same_everywhere(shape: str, backend: str, kv: KVCacheDtypeName) -> None:
    """Log-probabilities of greedy texts through the engine, against whole sequences with K/V rounded."""
    model = model_of(shape)
    reference = LoadedModel(rounding(model, kv), model.config)
    for request in requests(model, speculation=True)[2:5:2]:
        found = said(engine(model, maker(backend, kv)), [request])[0]
        text, source = [score.token_id for score in found], None
        before = request.prompt_token_ids
        if model.config.encoder is not None:
            source = before
            before = [model.config.encoder.start_token_id, *(request.decoder_prompt or ())]
        prefix = len(before) if model.config.prefix_lm else None
        logits = reference.logits([*before, *text], prefix=prefix, encoder_ids=source)
        wanted = logits[len(before) - 1 : -1].log_softmax(-1)[range(len(text)), text]
        assert np.abs(wanted.numpy() - [score.logprob for score in found]).max() < CLOSE[kv]


@NATIVE
@pytest.mark.parametrize("kv", FEWER)
@pytest.mark.parametrize("head_dim", [6, 16, 40])
def test_native_rounding_is_that_of_the_reference(kv: KVCacheDtypeName, head_dim: int) -> None:
    """It moves logits by many times as much as the two differ by."""
    model = tiny_model(head_dim=head_dim, num_kv_heads=1, num_loops=2)
    wanted = LoadedModel(rounding(model, kv), model.config).logits(IDS).numpy()
    unrounded = LoadedModel(model, model.config).logits(IDS).numpy()
    found = whole_logits(passes_for(model, kv_dtype=kv), IDS, 2, chunk=9)
    assert 4 * np.abs(found - wanted).mean() < np.abs(wanted - unrounded).mean()


def test_int8_stands_within_half_a_step_of_each_number() -> None:
    x = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 15).view(
        5, 3, 1
    )
    numbers, scales = to_int8(x)
    assert scales.shape == (5, 3, 1)
    assert torch.equal(numbers.abs().amax(-1), torch.full((5, 3), 127, dtype=torch.int8))
    assert ((numbers * scales - x).abs() <= 0.5001 * scales).all()
    nothing, scale = to_int8(torch.zeros(2, 8))
    assert not nothing.any()
    assert not scale.any()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_hidden_by_int8(number: float) -> None:
    x = torch.ones(2, 8)
    x[1, 3] = number
    steps, scales = to_int8(x)
    assert scales[1].isnan()  # nor an infinite one, whose steps would be anything
    assert not steps[1].any()
    assert torch.equal(read_back(x, torch.int8)[0], x[0])
    assert read_back(x, torch.int8)[1].isnan().all()


def _with_large_keys(scale: float) -> tuple[LoopedTransformer, Tensor]:
    model = tiny_model()
    size = model.config.num_heads * model.config.head_dim
    keys = model.get_parameter("layers.0.attn.qkv_proj.weight")[size : 2 * size]
    keys *= scale
    return model, keys


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
def test_a_key_that_is_no_number_is_a_fault(backend: str, kv: KVCacheDtypeName) -> None:
    """Whole numbers must not hide it."""
    model, _ = _with_large_keys(math.inf)
    asked = GenerationRequest(
        request_id="0", prompt_token_ids=[1, 2], max_tokens=1, sampling=SamplingParams()
    )
    last = engine(model, maker(backend, kv)).run([asked])["0"][-1]
    assert last.finish_reason == "error"
    assert "not a number" in (last.error or "")


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
def test_keys_too_large_for_fp16_are_cut_to_its_largest(backend: str) -> None:
    model, _ = _with_large_keys(1e6)
    asked = GenerationRequest(
        request_id="0", prompt_token_ids=[1, 2], max_tokens=3, ignore_eos=True, sampling=SamplingParams()
    )
    assert engine(model, maker(backend, "float16")).run([asked])["0"][-1].finish_reason == "length"


@pytest.mark.parametrize(
    "shape", ["multi_head", "prelude_and_coda", "two_stacks_both_ways", "behind_a_source"]
)
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
def test_memory_is_planned_by_what_k_and_v_take(backend: str, kv: KVCacheDtypeName, shape: str) -> None:
    """What is planned is what is allocated, and a cache of so many bytes holds the more tokens."""
    model, made = model_of(shape), maker(backend, kv)
    each, config = made.cache_bytes(model), model.config
    if isinstance(made, NativeOptions):
        passes = NativePasses(model, 512, 128, made)
        taken = passes.library.speed_cache_bytes(passes.packed.description, 32, made.kv_type)
    else:
        store = made.make(model, 512, 128).store
        stored = [store.keys, store.values, store.key_scales, store.value_scales]
        taken = sum(tensor.nbytes for tensors in stored for tensor in tensors)
        heads = 2 * (config.num_slots + len(config.source_caches)) * config.num_kv_heads
        assert each.keys_and_values == heads * head_bytes(config.head_dim, KV_DTYPES[kv])
    assert taken == 512 * each.keys_and_values
    memory = 100 * made.cache_bytes(model).per_token
    planned = Engine(model, EngineOptions(kv_cache_memory=memory, max_model_len=64), maker=made)
    assert planned.info.kv_cache_dtype == kv
    assert 100 <= planned.info.kv_cache_tokens < 100 + 2 * planned.info.kv_page_size


@NATIVE
@pytest.mark.parametrize("value", [-1, 4])
def test_a_type_that_there_is_none_of_is_refused(value: int) -> None:
    passes = passes_for(tiny_model())
    assert passes.library.speed_cache_bytes(passes.packed.description, 8, value) == 0
