"""Log-probabilities through the engine == log_softmax of whole forward passes without a cache."""

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.checkpoint.loader import LoadedModel, load_model
from model.engine import Engine
from model.network.looped import LoopedTransformer
from model.passes.scores import token_logprobs
from model.passes.torch.backend import TorchMaker
from model.protocol import GenerationRequest, SamplingParams, TokenEvent, TokenLogprobs
from server.settings import embedded_model
from tests.engine.test_engine import engine, prompts, request
from tests.tiny_models import SHAPES, tiny_model

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=1.3, top_k=9, presence_penalty=1.0, logit_bias={3: 4.0}, seed=5)


def exact_model(shape: str) -> LoopedTransformer:
    """In fp64, by torch: these weights amplify rounding, to 8e-4 in fp32 for a whole pass of the second."""
    return tiny_model(**SHAPES[shape]).double()


def reference(model: LoopedTransformer, ids: list[int], loops: int | None = None) -> torch.Tensor:
    """Log-probabilities (tokens - 1, vocab) of what may follow each token but the last."""
    logits = LoadedModel(model, model.config).logits(ids[:-1], num_loops=loops)
    return torch.as_tensor(logits).log_softmax(-1)


def assert_scores(
    scored: TokenLogprobs, token: int, logprobs: torch.Tensor, num_top: int, tolerance: float = 1e-5
) -> None:
    """Equal to the reference row; the order of near-equal tokens is free."""
    assert scored.token_id == token
    assert scored.logprob == pytest.approx(float(logprobs[token]), abs=tolerance)
    likelier = int((logprobs > logprobs[token] + 2 * tolerance).sum())
    no_less_likely = int((logprobs > logprobs[token] - 2 * tolerance).sum())
    assert likelier + 1 <= scored.rank <= max(no_less_likely, 1)
    best = logprobs.topk(num_top).values.tolist()
    assert [value for _, value in scored.top] == pytest.approx(best, abs=tolerance)
    assert [float(logprobs[i]) for i, _ in scored.top] == pytest.approx(best, abs=2 * tolerance)


def text_and_scores(events: list[TokenEvent]) -> tuple[list[int], list[TokenLogprobs]]:
    for event in events:
        assert len(event.logprobs) == len(event.token_ids)
    return [t for e in events for t in e.token_ids], [s for e in events for s in e.logprobs]


def run(shared: Engine, requests: list[GenerationRequest]) -> list[list[TokenEvent]]:
    answers = shared.run(requests)
    shared.check_integrity()
    return [answers[r.request_id] for r in requests]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", ["pre_norm", "prelude_and_coda", "one_loop"])
def test_logprobs_are_those_of_the_raw_logits_of_the_last_depth(shape: str, sampling: SamplingParams) -> None:
    """With speculation on and off, alone and in a batch: adjustments change the token, not its score."""
    model = exact_model(shape)
    asked = [
        request(5 * speculation + i, prompt, sampling, logprobs=i % 4, speculation=speculation)
        for speculation in (True, False)
        for i, prompt in enumerate(prompts(5))
    ]
    together = run(engine(model, row_budget=9, maker=TorchMaker()), asked)
    alone = [run(engine(model, maker=TorchMaker()), [r])[0] for r in asked]
    for r, *answers in zip(asked, together, alone, strict=True):
        for events in answers:
            text, scores = text_and_scores(events)
            expected = reference(model, r.prompt_token_ids + text)[len(r.prompt_token_ids) - 1 :]
            assert len(scores) == len(text) == 16
            for token, scored, row in zip(text, scores, expected, strict=True):
                assert len(scored.top) == r.logprobs
                assert_scores(scored, token, row, r.logprobs)


@given(
    length=st.integers(1, 70),
    chunk=st.integers(1, 40),
    num_top=st.integers(0, 5),
    max_tokens=st.integers(0, 3),
    loops=st.sampled_from([None, 2]),
    shape=st.sampled_from(["pre_norm", "prelude_and_coda"]),
)
@settings(max_examples=20, deadline=None)
def test_prompt_logprobs_score_every_prompt_token_but_the_first(
    length: int, chunk: int, num_top: int, max_tokens: int, loops: int | None, shape: str
) -> None:
    """At any chunk size, beside another request, with nothing generated or something."""
    model = exact_model(shape)
    prompt = [(7 * i * i + i) % 61 for i in range(length)]
    options = {"max_tokens": max_tokens, "prompt_logprobs": num_top, "num_loops": loops}
    asked = request(0, prompt, GREEDY, **options)
    other = request(1, prompts(1)[0], SAMPLED, logprobs=2)
    shared = engine(model, prefill_chunk_size=chunk, prefill_rows=chunk, maker=TorchMaker())
    events, others = run(shared, [asked, other])
    given_once = [e.prompt_logprobs for e in events if e.prompt_logprobs is not None]
    assert len(given_once) == 1
    assert events[0].prompt_logprobs is not None
    assert events[-1].finish_reason == "length"
    assert sum(len(e.token_ids) for e in events) == max_tokens
    assert len(text_and_scores(others)[1]) == 16
    first, *scores = given_once[0]
    assert first is None
    rows: Iterable[Tensor] = reference(model, prompt, loops) if length > 1 else ()
    for token, scored, row in zip(prompt[1:], scores, rows, strict=True):
        assert scored is not None
        assert_scores(scored, token, row, num_top)


def test_in_fp32_the_default_model_scores_within_one_part_in_10_000() -> None:
    """A prompt in two chunks and what follows it, beside another request.

    Rounding grows with depth: 5e-5 a token was seen on a model of 60 layers, loops counted.
    """
    loaded = load_model(embedded_model(), dtype="float32")
    text = [(31 * i * i + 7 * i) % loaded.config.vocab_size for i in range(40)]
    shared = engine(loaded.model, (1,), tokens=loaded.config.max_positions)
    asked = request(0, text, GREEDY, logprobs=3, prompt_logprobs=3)
    events, _ = run(shared, [asked, request(1, text[5:20], SAMPLED)])
    generated, scores = text_and_scores(events)
    rows = reference(loaded.model, text + generated)
    assert events[0].prompt_logprobs is not None
    for token, scored, row in zip(
        (text + generated)[1:], [*events[0].prompt_logprobs[1:], *scores], rows, strict=True
    ):
        assert scored is not None
        assert_scores(scored, token, row, 3, tolerance=1e-4)


def test_without_the_asking_nothing_is_scored() -> None:
    events = run(engine(tiny_model()), [request(0, [1, 2, 3], GREEDY)])[0]
    assert not any(event.logprobs or event.prompt_logprobs for event in events)


def test_an_abort_while_the_prompt_is_read_brings_no_half_of_its_scores() -> None:
    shared = engine(tiny_model(), prefill_chunk_size=4)
    shared.add(request(0, [1] * 30, GREEDY, prompt_logprobs=0))
    shared.step()
    shared.abort("0")
    (event,) = shared.step()
    assert (event.finish_reason, event.prompt_logprobs) == ("abort", None)


def test_ranks_count_from_one_and_the_top_is_ordered() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    token, logprob, rank, *top = token_logprobs(logits, torch.tensor([2]), 3)[0].tolist()
    assert (token, rank, set(top[:2])) == (2, 3, {1, 3})
    weights = [math.exp(x) for x in (1, 3, 2, 3)]
    assert logprob == pytest.approx(2 - math.log(sum(weights)), abs=1e-6)
    assert top[2] == 2
    assert top[3:] == pytest.approx([3 - math.log(sum(weights))] * 2 + [2 - math.log(sum(weights))], abs=1e-6)


def test_a_prompt_that_fills_the_whole_cache_is_scored_too() -> None:
    """It waited for ever: one position more than it needs was asked for before its first pass."""
    model = tiny_model()
    asked = [
        request(index, [index] * 128, GREEDY, max_tokens=0, prompt_logprobs=0, cache_salt=str(index))
        for index in range(3)
    ]
    for events in run(engine(model, tokens=128), asked):
        assert [event.finish_reason for event in events] == ["length"]
        assert len(events[0].prompt_logprobs or []) == 128
