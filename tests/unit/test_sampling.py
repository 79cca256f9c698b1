"""Sampling: the noise, the distribution, the filters, the penalties, and independence of the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.passes import sampling
from model.passes.noise import gumbel_noise_numpy, gumbel_noise_torch, philox_bits
from model.passes.sampling import (
    Sampler,
    apply_penalties,
    keep_top,
)
from model.protocol import GenerationRequest, SamplingParams
from model.schedule.batch import Readout
from model.schedule.counts import Counted, TokenCounts
from model.schedule.drafts import make_policy
from model.schedule.pages import PrefixKeys
from model.schedule.sequence import Sequence
from model.schedule.wave import Wave
from tests.loose import Field

CPU = torch.device("cpu")
VOCAB = 64


def readout(
    params: SamplingParams, position: int = 3, tokens: list[int] | None = None, **options: Field
) -> Readout:
    prompt = tokens or [1, 2, 3]
    request = GenerationRequest(
        request_id=f"r{params.seed}", prompt_token_ids=prompt, max_tokens=50, sampling=params, **options
    )
    ending = frozenset(request.stop_token_ids)
    wave = Wave(prompt, 4, make_policy("none", frozenset()), 100, ending)
    return Readout(0, Sequence(request, wave, PrefixKeys("", 16)), position)


@given(seed=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 2**31), count=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_the_torch_philox_equals_numpys(seed: int, position: int, count: int) -> None:
    """One is numpy's C code, the other runs on a GPU; the noise from both is the same too."""
    ours = philox_bits([(seed, position)], count, CPU).numpy().view(np.uint64)[0]
    theirs = np.random.Philox(key=seed % 2**64, counter=position << 64).random_raw(count)
    assert (ours == theirs).all()
    noise = gumbel_noise_torch([(seed, position)], count, CPU)
    assert torch.equal(noise[0], gumbel_noise_numpy(seed, position, count))


def test_sampled_tokens_follow_the_filtered_softmax() -> None:
    """Chi-square over 20,000 seeds; false alarm 1e-6 for a fixed set of seeds: it never flickers."""
    logits = torch.linspace(-1, 2, VOCAB)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))]
    params = [SamplingParams(temperature=0.7, top_p=0.9, seed=seed) for seed in range(20_000)]
    rows = [readout(p) for p in params]
    tokens = Sampler(VOCAB, CPU).sample(logits.expand(len(rows), -1), rows, {})
    scores = (logits / 0.7)[None]
    kept = keep_top(scores, torch.tensor([[VOCAB]]), torch.tensor([[0.9]]))
    expected = kept.softmax(-1)[0].double() * len(rows)
    observed = tokens.bincount(minlength=VOCAB).double()
    live = expected > 0
    assert observed[~live].sum() == 0
    statistic = float(((observed - expected)[live] ** 2 / expected[live]).sum())
    freedom = int(live.sum()) - 1
    # Wilson-Hilferty: (chi2 / k)^(1/3) is nearly normal; 4.75 sigma is one in a million.
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert deviation < 4.75


def test_positions_and_seeds_give_independent_noise() -> None:
    noise = torch.stack([gumbel_noise_numpy(*key, 50_000) for key in ((1, 1), (1, 2), (2, 1))])
    correlation = torch.corrcoef(noise) - torch.eye(3)
    assert correlation.abs().max() < 5 / 50_000**0.5
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)


@given(
    scores=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    top_k=st.integers(1, 12),
    top_p=st.floats(0.05, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_keep_top_keeps_the_smallest_likeliest_set(scores: list[float], top_k: int, top_p: float) -> None:
    """Against the definition in plain Python, away from ties at the edge of p."""
    values = torch.tensor([scores])
    kept = keep_top(values, torch.tensor([[min(top_k, len(scores))]]), torch.tensor([[top_p]]))[0]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    weights = torch.tensor([scores[i] for i in order], dtype=torch.float64).softmax(0).tolist()
    before, expected, edge = 0.0, set(), False
    for index, weight in zip(order, weights, strict=True):
        edge = edge or abs(before - top_p) < 1e-5
        if before < top_p or top_p >= 1:
            expected.add(index)
        before += weight
    if not edge:
        assert {i for i in range(len(scores)) if kept[i] > -torch.inf} == expected


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_looking_at_the_likeliest_tokens_only_gives_what_sorting_all_gives(spread: float) -> None:
    """A flat row needs more than the 512 likeliest, a steep one does not; each top_k and top_p with each."""
    scores = spread * torch.randn(6, 2000, generator=torch.Generator().manual_seed(1))
    top_k = torch.tensor([[2000], [2000], [1500], [40], [600], [2000]])
    top_p = torch.tensor([[0.5], [0.99], [0.9], [0.9], [1.0], [1.0]])
    got = torch.cat([keep_top(scores[i : i + 1], top_k[i : i + 1], top_p[i : i + 1]) for i in range(6)])
    floor, complete = sampling._floor(scores, top_k, top_p, 2000)
    assert complete.all()
    assert torch.equal(got > -torch.inf, scores >= floor)


def test_min_p_drops_what_is_far_less_likely_than_the_best() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    tokens = {
        int(Sampler(4, CPU).sample(logits, [readout(SamplingParams(min_p=0.4, seed=seed))], {}))
        for seed in range(300)
    }
    assert tokens == {0, 1}


def test_a_row_is_sampled_alike_alone_and_in_any_batch() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3))
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, top_p=0.9, seed=5),
        SamplingParams(temperature=1.3, top_k=7, seed=5),
        SamplingParams(temperature=1.0, min_p=0.1, frequency_penalty=0.5, seed=9),
        SamplingParams(temperature=0, logit_bias={7: 100.0}),
    ]
    rows = [readout(p) for p in params]
    together = Sampler(VOCAB, CPU).sample(logits, rows, {}).tolist()
    alone = [int(Sampler(VOCAB, CPU).sample(logits[i : i + 1], [rows[i]], {})) for i in range(5)]
    assert together == alone
    assert together[0] == int(logits[0].argmax())
    assert together[4] == 7


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(1, VOCAB)
    before = logits.clone()
    Sampler(VOCAB, CPU).sample(logits, [readout(SamplingParams(presence_penalty=1.0, logit_bias={1: 5}))], {})
    assert torch.equal(logits, before)


def test_penalties_follow_their_definitions() -> None:
    """OpenAI's for presence and frequency (output only), the CTRL paper's for repetition."""
    scores = torch.tensor([2.0, -2.0, 1.0, 0.5])
    counts = Counted(np.array([0, 1, 3], np.int32), np.array([0, 2, 1], np.int32))
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    apply_penalties(scores, counts, params)
    assert scores.tolist() == pytest.approx([1.0, -4.0 - 0.5 - 0.5, 1.0, 0.25 - 0.25 - 0.5])


def test_token_counts_see_drafts_but_never_keep_them() -> None:
    row = readout(SamplingParams(presence_penalty=1.0), position=3, tokens=[4, 4, 5])
    wave, counts = row.sequence.wave, TokenCounts()
    wave.tokens += [6, 7, 7]  # one committed, two drafts
    wave.num_committed = 4

    def counted(position: int) -> dict[int, int]:
        found = counts.upto(wave, position)
        return dict(zip(found.tokens.tolist(), found.outputs.tolist(), strict=True))

    assert counted(6) == {4: 0, 5: 0, 6: 1, 7: 2}
    wave.tokens[4:] = [8, 4]  # the drafts are flushed
    assert counted(6) == {4: 1, 5: 0, 6: 1, 8: 1}
    wave.tokens[4:] = [5, 5]
    wave.num_committed = 6
    assert counted(6) == {4: 0, 5: 2, 6: 1}


def test_an_ending_token_cannot_come_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 50.0
    sampler = Sampler(VOCAB, CPU)
    params = SamplingParams(temperature=0)
    early = readout(params, position=4, min_tokens=2, stop_token_ids=[9])
    late = readout(params, position=5, min_tokens=2, stop_token_ids=[9])
    assert int(sampler.sample(logits, [early], {})) != 9
    assert int(sampler.sample(logits, [late], {})) == 9
