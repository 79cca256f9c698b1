"""What every family's shape owes to speculation: sampled texts, the cache after flushes, a noisy start.

Greedy texts of every shape are compared in test_engine; these are the other invariants.
"""

import pytest
import torch

from model.engine import Engine
from model.network.looped import LoopedTransformer
from model.options import EngineOptions
from model.passes.noise import state_noise
from model.protocol import GenerationRequest, SamplingParams
from tests.tiny_models import SHAPES, tiny_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], [7], [2, 7, 1, 8, 2, 8, 1, 8]]
GREEDY = SamplingParams(temperature=0)
NOISY = {**SHAPES["prelude_and_coda"], "initial_state_std": 1.5}


def engine(model: LoopedTransformer, draft_depths=None, chunk: int = 6) -> Engine:
    limits = {"prefill_chunk_size": chunk, "prefill_rows": 2 * chunk}
    return Engine(model, EngineOptions(draft_depths=draft_depths, kv_cache_tokens=512, **limits))


def request(index: int, prompt: list[int], sampling: SamplingParams = GREEDY, **options) -> GenerationRequest:
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
    wavy, reader = engine(model, all_depths(model)), engine(model, ())
    events = wavy.run([request(0, PROMPTS[0])])["0"]
    text = [token for event in events for token in event.token_ids]
    assert model.config.num_loops == 1 or events[-1].stats.rejected_drafts > 0
    texts(reader, [request(0, PROMPTS[0] + text[:-1], max_tokens=1)])
    used = len(PROMPTS[0]) + len(text) - 1  # both engines give the first pages, in order
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
    assert "init_scale is 1.0" in (events[0].error or "")
