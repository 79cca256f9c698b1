"""A text, and the bits of every score in it, are the same whatever else runs: in every type of weights."""

import random

import pytest
import torch

from model.engine import Engine
from model.network.int8 import quantize_linears
from model.network.looped import LoopedTransformer
from model.options import EngineOptions
from model.passes.native.backend import NativeOptions
from model.protocol import GenerationRequest, SamplingParams, TokenLogprobs
from tests.loose import Field
from tests.tiny_models import SHAPES, tiny_model

pytestmark = pytest.mark.native
KINDS: tuple[dict[str, Field], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.2, "top_k": 9, "presence_penalty": 0.5},
    {"temperature": 1.0},
)
Said = dict[str, list[TokenLogprobs]]


def requests(count: int, speculation: bool) -> list[GenerationRequest]:
    """Mixed lengths, greedy and sampled, some with penalties."""
    rng = random.Random(0)
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=[rng.randrange(61) for _ in range(rng.randint(1, 24))],
            max_tokens=rng.randint(4, 32),
            sampling=SamplingParams(seed=index, **rng.choice(KINDS)),
            ignore_eos=True,
            speculation=speculation,
            logprobs=2,
        )
        for index in range(count)
    ]


def engine(
    model: LoopedTransformer, int4: bool, tokens: int = 1024, budget: int = 32, **limits: Field
) -> Engine:
    options = EngineOptions(kv_cache_tokens=tokens, row_budget=budget, **limits)
    return Engine(model, options, maker=NativeOptions(threads=1, int4=int4))


def said(engine: Engine, asked: list[GenerationRequest]) -> Said:
    """Every token with its scores, which hold its logits' last bits."""
    events = engine.run(asked)
    engine.check_integrity()
    return {name: [score for event in each for score in event.logprobs] for name, each in events.items()}


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_and_scores_are_the_same_bits_alone_and_in_any_batch(shape: str, weights: str) -> None:
    """Plain decoding, one request at a time, against speculation in batches with other chunks, and with
    memory so short that sequences make way and lie scattered."""
    model = tiny_model(**SHAPES[shape])
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    if weights == "int8":
        quantize_linears(model)
    int4 = weights == "int4"
    plain = engine(model, int4, prefill_chunk_size=60, prefill_rows=60)
    expected: Said = {}
    for request in requests(6, speculation=False):
        expected |= said(plain, [request])
    assert len({tuple(score.token_id for score in scores) for scores in expected.values()}) > 1
    assert said(engine(model, int4, prefill_chunk_size=7, prefill_rows=40), requests(6, True)) == expected
    short = engine(model, int4, tokens=80, budget=9, prefill_chunk_size=13, max_model_len=64)
    assert said(short, requests(6, speculation=True)) == expected
    assert short.stats.preemptions > 0
