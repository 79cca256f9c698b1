"""What every family's shape owes to speculation: sampled texts, the cache after flushes, a noisy start.

Greedy texts of every shape are compared in test_engine; these are the other invariants.
"""

import pytest
import torch

from model.engine import Engine
from model.network.looped import LoopedTransformer
from model.options import EngineOptions
from model.passes.backend import BackendMaker
from model.passes.noise import state_noise
from model.passes.torch.backend import TorchBackend, TorchMaker
from model.protocol import GenerationRequest, SamplingParams
from tests.engine.native_tools import maker_for
from tests.loose import Field
from tests.tiny_models import SHAPES, tiny_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], [7], [2, 7, 1, 8, 2, 8, 1, 8]]
GREEDY = SamplingParams(temperature=0)
NOISY = {**SHAPES["prelude_and_coda"], "initial_state_std": 1.5}


def engine(
    model: LoopedTransformer,
    draft_depths: tuple[int, ...] | None = None,
    chunk: int = 6,
    maker: BackendMaker | None = None,
) -> Engine:
    options = EngineOptions(
        draft_depths=draft_depths, kv_cache_tokens=512, prefill_chunk_size=chunk, prefill_rows=2 * chunk
    )
    return Engine(model, options, maker=maker or maker_for(model))


def request(
    index: int, prompt: list[int], sampling: SamplingParams = GREEDY, **options: Field
) -> GenerationRequest:
    fields = {"max_tokens": 12, "ignore_eos": True, **options}
    return GenerationRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling, **fields)


def texts(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    events = engine.run(requests)
    engine.check_integrity()
    return [[t for event in events[r.request_id] for t in event.token_ids] for r in requests]


def all_depths(model: LoopedTransformer) -> tuple[int, ...]:
    return tuple(range(1, model.config.num_loops))


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_text_is_that_of_plain_decoding(shape: str) -> None:
    model = tiny_model(**SHAPES[shape])
    requests = [request(i, p, SamplingParams(temperature=0.9, seed=i)) for i, p in enumerate(PROMPTS)]
    alone = [texts(engine(model, ()), [r])[0] for r in requests]
    assert texts(engine(model), requests) == alone
    assert texts(engine(model, all_depths(model)), requests) == alone


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_after_flushes_is_the_cache_of_the_committed_tokens(shape: str) -> None:
    """Every slot of every layer, those of a coda too, which draft readouts fill provisionally."""
    model = tiny_model(**SHAPES[shape])
    wavy, reader = (engine(model, depths, maker=TorchMaker()) for depths in (all_depths(model), ()))
    events = wavy.run([request(0, PROMPTS[0])])["0"]
    text = [token for event in events for token in event.token_ids]
    stats = events[-1].stats
    assert stats is not None
    assert model.config.num_loops == 1 or stats.rejected_drafts > 0
    if model.config.prefix_lm:  # the text is no prompt: it is written again, without drafts
        assert texts(reader, [request(0, PROMPTS[0])]) == [text]
    else:
        texts(reader, [request(0, PROMPTS[0] + text[:-1], max_tokens=1)])
    used = len(PROMPTS[0]) + len(text) - 1  # both engines give the first pages, in order
    assert isinstance(wavy.backend, TorchBackend)
    assert isinstance(reader.backend, TorchBackend)
    for name in ("keys", "values"):
        for ours, theirs in zip(
            getattr(wavy.backend.store, name), getattr(reader.backend.store, name), strict=True
        ):
            assert torch.allclose(ours[:, :used], theirs[:, :used], atol=1e-4)


@torch.inference_mode()
def noisy_greedy(model: LoopedTransformer, prompt: list[int], seed: int, scale: float) -> list[int]:
    """A whole forward pass for every token, from the state that the seed gives."""
    ids = list(prompt)
    for _ in range(12):
        state = (
            scale * model.config.initial_state_std * state_noise(seed, 0, len(ids), model.config.hidden_size)
        )
        ids.append(
            int(model.whole_readout(model.depths(torch.tensor([ids]), None, state)[-1])[0, -1].argmax())
        )
    return ids[len(prompt) :]


def test_a_noisy_start_is_decided_by_the_seed_alone() -> None:
    """Not by the batch, the chunks, speculation or a prefix that another seed has left in the cache."""
    model = tiny_model(**NOISY)
    prompts = [PROMPTS[0], PROMPTS[0], *PROMPTS, PROMPTS[0] * 2, PROMPTS[0] * 2]
    seeds, scales = [1, 2, 1, 1, 1, 2, 1], [1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    wanted = [noisy_greedy(model, *facts) for facts in zip(prompts, seeds, scales, strict=True)]
    assert wanted[0] != wanted[1]
    requests = [
        request(i, prompt, SamplingParams(temperature=0, seed=seed), init_scale=scale)
        for i, (prompt, seed, scale) in enumerate(zip(prompts, seeds, scales, strict=True))
    ]
    for depths, chunk in (((), 50), (None, 7), (all_depths(model), 3)):
        assert texts(engine(model, depths, chunk), requests) == wanted
        one_by_one = engine(model, depths, chunk)
        assert [texts(one_by_one, [r])[0] for r in requests] == wanted


def test_without_a_scale_the_state_starts_from_zeros_whatever_the_seed() -> None:
    model = tiny_model(**NOISY)
    zero = noisy_greedy(model, PROMPTS[0], 5, 0.0)
    for seed in (1, 2):
        assert texts(engine(model), [request(0, PROMPTS[0], SamplingParams(temperature=0, seed=seed))]) == [
            zero
        ]


def test_a_model_that_starts_from_its_input_refuses_noise() -> None:
    events = engine(tiny_model()).run([request(0, [1], init_scale=1.0)])["0"]
    assert [event.finish_reason for event in events] == ["error"]
    assert "init_scale is 1, but" in (events[0].error or "")


BOTH_WAYS = SHAPES["two_stacks_both_ways"]


@torch.inference_mode()
def both_ways_greedy(model: LoopedTransformer, prompt: list[int]) -> list[int]:
    """A whole forward pass for every token: the prompt both ways, its text causally behind it."""
    ids = list(prompt)
    for _ in range(12):
        states = model.depths(torch.tensor([ids]), prefix=len(prompt))
        ids.append(int(model.whole_readout(states[-1])[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_prompt_that_is_read_both_ways_enters_whole_whatever_the_limits() -> None:
    """Longer than a chunk and than all that a pass reads of prompts, beside others that decode."""
    model = tiny_model(**BOTH_WAYS)
    prompts = [[(3 * i + j) % 61 for j in range(length)] for i, length in enumerate((1, 40, 5, 33, 17))]
    wanted = [both_ways_greedy(model, prompt) for prompt in prompts]
    for chunk in (4, 6, 64):
        shared = engine(model, None, chunk)
        assert texts(shared, [request(i, prompt) for i, prompt in enumerate(prompts)]) == wanted
        beside = engine(model, None, chunk)
        beside.add(request(9, [1, 2, 3], max_tokens=60))
        for _ in range(6):
            beside.step()
        for i, prompt in enumerate(prompts):
            beside.add(request(i, prompt))
        assert said_by(beside)["0"] == wanted[0]
        beside.check_integrity()


def said_by(engine: Engine) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            said.setdefault(event.request_id, []).extend(event.token_ids)
    return said


def test_a_prompt_that_is_read_both_ways_is_shared_with_itself_alone() -> None:
    """K/V of a position depends on the whole prompt: one that begins alike must not find it."""
    model = tiny_model(**BOTH_WAYS)
    prompt = [(5 * i) % 61 for i in range(36)]
    shared = engine(model)
    cached = []
    for each in (prompt, prompt, [*prompt, 7], prompt[:-1]):
        events = shared.run([request(0, each)])["0"]
        assert [t for event in events for t in event.token_ids] == both_ways_greedy(model, each)
        stats = events[-1].stats
        assert stats is not None
        cached.append(stats.cached_prompt_tokens)
    assert cached == [0, 32, 0, 0]


def test_scores_of_a_prompt_that_is_read_both_ways_are_refused_and_those_of_its_text_are_not() -> None:
    model = tiny_model(**BOTH_WAYS)
    refused = engine(model).run([request(0, [1, 2, 3], prompt_logprobs=1)])["0"]
    assert [event.finish_reason for event in refused] == ["error"]
    assert "reads its prompt both ways" in (refused[0].error or "")
    scored = engine(model).run([request(0, [1, 2, 3], logprobs=1)])["0"]
    logits = model.whole_readout(model.depths(torch.tensor([[1, 2, 3]]), prefix=3)[-1])[0, -1]
    first = scored[0].logprobs[0] if scored[0].logprobs else scored[1].logprobs[0]
    assert first.logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


def test_a_request_may_ask_for_more_loops_where_there_are_slots_for_them() -> None:
    """Beside requests at the model's own depth and below, with drafts and without; no more than that."""
    model = tiny_model(**{**SHAPES["unit_vectors"], "num_loops": 2, "max_loops": 4})
    requests = [request(i, PROMPTS[i % 3], num_loops=depth) for i, depth in enumerate((None, 1, 2, 3, 4, 4))]
    wanted = [plain_text(model, r) for r in requests]
    assert len({tuple(text) for text in wanted}) == 6
    assert texts(engine(model), requests) == wanted
    assert texts(engine(model, ()), requests) == wanted
    refused = engine(model).run([request(0, [1], num_loops=5)])["0"]
    assert "num_loops is 5, but the model has 4 loops" in (refused[-1].error or "")


@torch.inference_mode()
def plain_text(model: LoopedTransformer, asked: GenerationRequest) -> list[int]:
    ids = list(asked.prompt_token_ids)
    for _ in range(asked.max_tokens):
        states = model.depths(torch.tensor([ids]), asked.num_loops)
        ids.append(int(model.whole_readout(states[-1])[0, -1].argmax()))
    return ids[len(asked.prompt_token_ids) :]
