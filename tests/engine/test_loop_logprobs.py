"""What each loop says, and exits by the gate, through the engine == whole forward passes without a cache."""

from collections.abc import Iterable

import msgspec
import pytest
import torch
from torch import Tensor, nn

from model.checkpoint.loader import load_model
from model.engine import Engine
from model.network.looped import LoopedTransformer
from model.passes.native.backend import NativeOptions
from model.passes.torch.backend import TorchMaker
from model.protocol import GenerationRequest, LoopScores, SamplingParams, TokenEvent
from server.settings import embedded_model
from tests.engine.native_tools import maker_for
from tests.engine.test_engine import engine, prompts, request
from tests.engine.test_logprobs import GREEDY, SAMPLED, assert_scores, run, text_and_scores
from tests.loose import Field
from tests.tiny_models import SHAPES, tiny_model

GATED = {**SHAPES["sandwich"], "num_loops": 4, "exit_gate": True}  # Ouro's shape
TOLERANCE = 1e-4


def gated_model() -> LoopedTransformer:
    """Its gate stops at each of the loops now and then."""
    model = tiny_model(**GATED)
    with torch.no_grad():
        nn.init.constant_(model.gate.bias, -0.4)
        model.gate.weight.mul_(0.5)
    return model


def loops_of(events: Iterable[TokenEvent]) -> list[list[LoopScores]]:
    """Of each token, what the loops say."""
    found = []
    for event in events:
        assert len(event.loop_logprobs) == len(event.token_ids)
        found += event.loop_logprobs
    return found


@torch.inference_mode()
def reference(model: LoopedTransformer, asked: GenerationRequest, text: list[int]) -> tuple[Tensor, Tensor]:
    """Of each token of the text, log-probabilities (loops, tokens, vocab) and gates (loops, tokens)."""
    before = len(asked.prompt_token_ids)
    ids = torch.tensor([asked.prompt_token_ids + text[:-1]])
    states = model.depths(ids, asked.num_loops, prefix=before if model.config.prefix_lm else 0)
    hidden = torch.stack([each[0, before - 1 :] for each in model.whole_loops(states)])
    gates = model.gate(hidden).sigmoid()[..., 0] if model.config.exit_gate else hidden[..., 0]
    return model.logits(hidden).float().log_softmax(-1), gates


def assert_loops(
    model: LoopedTransformer, asked: GenerationRequest, events: list[TokenEvent], tolerance: float
) -> None:
    """Every loop's scores, agreement and gate are those of the reference."""
    text, told = text_and_scores(events)[0], loops_of(events)
    logprobs, gates = reference(model, asked, text)
    for index, (token, loops) in enumerate(zip(text, told, strict=True)):
        assert len(loops) == len(logprobs)
        for loop, said in enumerate(loops):
            row, last = logprobs[loop, index], logprobs[-1, index]
            assert len(said.scores.top) == asked.loop_logprobs
            assert_scores(said.scores, token, row, asked.loop_logprobs or 0, tolerance)
            (first, second), best = row.topk(2).values.tolist(), last.topk(2).values
            if first - second > 2 * tolerance and best[0] - best[1] > 2 * tolerance:
                assert said.agrees == (row.argmax() == last.argmax())
            if model.config.exit_gate:
                assert said.gate == pytest.approx(float(gates[loop, index]), abs=tolerance)
            else:
                assert said.gate is None


def asked_for(count: int = 6, **options: Field) -> list[GenerationRequest]:
    """Requests of all kinds; every third one asks for no loops, every second one is speculated for."""
    return [
        request(
            i,
            prompt,
            SAMPLED if i % 4 == 1 else GREEDY,
            **{
                "loop_logprobs": i % 3 if i % 3 else None,
                "logprobs": 1,
                "speculation": i % 2 == 0,
                **options,
            },
        )
        for i, prompt in enumerate(prompts(count))
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_loop_says_what_a_whole_forward_pass_says(shape: str) -> None:
    """By torch in fp64, since these weights amplify rounding; beside requests that ask for nothing."""
    model = tiny_model(**SHAPES[shape]).double()
    requests = asked_for()
    answers = run(engine(model, maker=TorchMaker()), requests)
    told = 0
    for asked, events in zip(requests, answers, strict=True):
        if asked.loop_logprobs is None:
            assert not any(event.loop_logprobs for event in events)
            continue
        told += 1
        assert_loops(model, asked, events, 1e-5)
    assert told == 4


@pytest.mark.native
@pytest.mark.parametrize("shape", SHAPES)
def test_native_passes_say_the_same_bits_whatever_runs(shape: str) -> None:
    """Alone and in a batch, with and without drafts; scores are torch's, the last loop's are `logprobs`."""
    model = tiny_model(**SHAPES[shape])
    requests = asked_for(4, loop_logprobs=2, logprobs=2, max_tokens=10)
    together = run(engine(model, row_budget=9), requests)
    narrow, plain = engine(model, prefill_chunk_size=5), engine(model)
    for asked, events in zip(requests, together, strict=True):
        (unasked,) = run(plain, [msgspec.structs.replace(asked, loop_logprobs=None)])
        assert text_and_scores(events) == text_and_scores(unasked)
        (turned,) = run(narrow, [msgspec.structs.replace(asked, speculation=not asked.speculation)])
        assert loops_of(turned) == loops_of(events)
        assert [loops[-1].scores for loops in loops_of(events)] == text_and_scores(events)[1]
        assert all(loops[-1].agrees for loops in loops_of(events))
        assert_loops(model, asked, events, 5e-3)  # fp32, see `exact_model`


@pytest.mark.parametrize("maker", ["torch", pytest.param("native", marks=pytest.mark.native)])
def test_in_fp32_the_default_model_says_it_within_one_part_in_10_000(maker: str) -> None:
    loaded = load_model(embedded_model(), dtype="float32")
    text = [(31 * i * i + 7 * i) % loaded.config.vocab_size for i in range(40)]
    native = NativeOptions(threads=1, kv_dtype="float32")
    shared = engine(
        loaded.model, tokens=loaded.config.max_positions, maker=TorchMaker() if maker == "torch" else native
    )
    asked = request(0, text, GREEDY, loop_logprobs=3, logprobs=3)
    events, _ = run(shared, [asked, request(1, text[5:20], SAMPLED)])
    assert_loops(loaded.model, asked, events, TOLERANCE)
    assert [loops[-1].scores for loops in loops_of(events)] == text_and_scores(events)[1]


@pytest.mark.parametrize("shape", ["pre_norm", "prelude_and_coda"])
def test_another_depth_has_its_own_loops(shape: str) -> None:
    model = tiny_model(**SHAPES[shape]).double()
    (asked,) = asked_for(1, num_loops=2, loop_logprobs=1)
    (events,) = run(engine(model, maker=TorchMaker()), [asked])
    assert {len(loops) for loops in loops_of(events)} == {2}
    assert_loops(model, asked, events, 1e-5)


def test_speculation_goes_on_where_no_coda_must_wait() -> None:
    """The passes are those of the same request without the asking; behind a coda there are R a token."""
    for shape, costs_more in (("pre_norm", False), ("coda_behind_a_closing_norm", True)):
        model = tiny_model(**SHAPES[shape])
        passes = []
        for asked in (None, 0):
            (events,) = run(
                engine(model), [request(0, [1, 2, 3], GREEDY, loop_logprobs=asked, max_tokens=60)]
            )
            stats = events[-1].stats
            assert stats is not None
            passes.append(stats.passes)
        assert passes[0] < 59 * 3
        assert passes[1] == (59 * 3 if costs_more else passes[0])


# ---- exits -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def exits_of(
    model: LoopedTransformer, prompt: list[int], threshold: float, count: int
) -> tuple[list[int], list[int]]:
    """The likeliest tokens of the loops at which Ouro's reference exits, and which loops these are.

    It runs all loops for all tokens, and takes the first loop where the sum of the probabilities to stop
    there reaches the threshold, the last one if none does.
    """
    ids, exits = list(prompt), list[int]()
    for _ in range(count):
        states = model.depths(torch.tensor([ids]))
        hidden = torch.stack([model.whole_finish(state)[0, -1] for state in states])
        stops = model.gate(hidden).sigmoid()[:, 0]
        before = torch.cat([stops.new_ones(1), (1 - stops).cumprod(0)[:-1]])
        reached = ((stops * before).cumsum(0) >= threshold).nonzero()
        exits.append(int(reached[0]) + 1 if len(reached) else len(states))
        ids.append(int(model.logits(hidden[exits[-1] - 1]).argmax()))
    return ids[len(prompt) :], exits


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_with_a_threshold_a_token_is_that_of_the_loop_where_the_reference_exits(
    backend: str, threshold: float
) -> None:
    """Read in chunks, beside each other and beside requests that run all loops, which it does not change."""
    model = gated_model()
    maker = TorchMaker() if backend == "torch" else maker_for(model)
    shared = engine(model, maker=maker, prefill_chunk_size=5, row_budget=9)
    requests = [
        request(i, prompt, GREEDY, exit_threshold=threshold if i % 2 else None, loop_logprobs=0, logprobs=1)
        for i, prompt in enumerate(prompts(6))
    ]
    answers = run(shared, requests)
    seen = set[int]()
    for asked, events in zip(requests, answers, strict=True):
        text, scores = text_and_scores(events)
        loops = loops_of(events)
        assert [each[-1].scores.logprob for each in loops] == [score.logprob for score in scores]
        if asked.exit_threshold is None:
            assert {len(each) for each in loops} == {4}
            (alone,) = run(engine(model, maker=maker), [asked])
            assert text_and_scores(alone)[0] == text
            continue
        expected, exits = exits_of(model, asked.prompt_token_ids, threshold, len(text))
        assert (text, [len(each) for each in loops]) == (expected, exits)
        stats = events[-1].stats
        assert stats is not None
        assert stats.passes >= sum(exits[1:])  # more where others took its rows' places
        seen.update(exits)
    assert len(seen) > 1


def text_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def test_a_seed_and_adjustments_choose_among_the_logits_of_the_exit() -> None:
    """The same text alone, in a batch and after pre-emption."""
    model = gated_model()
    requests = [
        request(
            i,
            prompt[:12],
            SamplingParams(temperature=0.8, seed=i, presence_penalty=0.5),
            exit_threshold=0.6,
            max_tokens=40,
        )
        for i, prompt in enumerate(prompts(6))
    ]
    wide, narrow = engine(model, row_budget=64), engine(model, tokens=80, max_model_len=64)
    together, pressed = run(wide, requests), run(narrow, requests)
    assert narrow.stats.preemptions
    for asked, *answers in zip(requests, together, pressed, strict=True):
        (alone,) = run(engine(model), [asked])
        assert [text_of(events) for events in answers] == [text_of(alone)] * 2


def test_a_model_without_a_gate_refuses_a_threshold() -> None:
    (events,) = run(engine(tiny_model()), [request(0, [1], GREEDY, exit_threshold=0.5)])
    assert events[-1].is_refusal
    assert "exit_threshold is 0.5, but this model has no exit gate" in (events[-1].error or "")


def test_an_abort_between_two_loops_leaves_nothing_behind() -> None:
    shared: Engine = engine(tiny_model())
    shared.add(request(0, [1, 2, 3], GREEDY, loop_logprobs=1))
    shared.step()
    shared.abort("0")
    (event,) = shared.step()
    assert (event.finish_reason, event.loop_logprobs) == ("abort", [])
    shared.check_integrity()
