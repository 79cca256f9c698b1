"""What the engine samples with speculation on follows the model's own distribution."""

import torch

from model.checkpoint.loader import LoadedModel
from model.protocol import SamplingParams
from tests.engine.test_engine import engine, request
from tests.tiny_models import tiny_model

TEMPERATURE = 1.5
NUM_SEEDS = 3000


def deviation(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square in standard deviations (Wilson-Hilferty); rare tokens, expected below 5, count as one."""
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    freedom = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5)


def test_tokens_drafted_and_confirmed_follow_the_softmax_of_the_last_depth() -> None:
    """Chi-square over 3,000 seeds; false alarm 1e-6 for this fixed set of seeds, so it never flickers."""
    model = tiny_model(num_loops=3)
    prompt = [3, 1, 4, 7]
    logits = LoadedModel(model, model.config).logits(prompt)[-1]
    requests = [
        request(seed, prompt, SamplingParams(temperature=TEMPERATURE, seed=seed), max_tokens=3)
        for seed in range(NUM_SEEDS)
    ]
    shared = engine(model, (1, 2), policy="recheck")
    answers = shared.run(requests)
    shared.check_integrity()
    first = torch.tensor([answers[r.request_id][0].token_ids[0] for r in requests])
    stats = [answers[r.request_id][-1].stats for r in requests]
    rejected = sum(each.rejected_drafts for each in stats if each is not None)
    assert rejected > NUM_SEEDS / 10  # drafts were there, and some were wrong
    expected = (logits / TEMPERATURE).softmax(-1).double() * NUM_SEEDS
    assert deviation(first.bincount(minlength=61).double(), expected) < 4.75
