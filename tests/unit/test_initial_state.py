"""The noise that a state starts from: its distribution, and that it depends on seed and position alone."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.passes.noise import CUT, gumbel_noise_numpy, state_noise

seeds = st.integers(-(2**63), 2**63 - 1)


@given(seeds, st.integers(0, 1 << 20), st.integers(1, 9), st.integers(1, 40), st.data())
def test_a_position_has_the_same_noise_however_it_is_asked_for(
    seed: int, start: int, count: int, size: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, count - 1))
    alone = state_noise(seed, start + row, 1, size)
    assert torch.equal(state_noise(seed, start, count, size)[row], alone[0])


def test_other_seeds_and_positions_have_other_noise() -> None:
    rows = [state_noise(seed, position, 1, 8) for seed in (0, 1, -1) for position in (0, 1, 2**20)]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 9


def test_it_is_a_normal_distribution_cut_at_three_deviations() -> None:
    """Kolmogorov-Smirnov on 200,000 numbers: by chance it fails less than once in a million (1.63 is 1 %)."""
    noise = np.sort(state_noise(7, 0, 200, 1000).double().numpy().ravel())
    tail = 0.5 * math.erfc(CUT / math.sqrt(2))
    normal = 0.5 * (1 + np.array([math.erf(x / math.sqrt(2)) for x in noise[::100]]))
    wanted = (normal - tail) / (1 - 2 * tail)
    found = np.arange(len(noise))[::100] / len(noise)
    assert np.abs(found - wanted).max() * math.sqrt(len(noise)) < 2.8
    assert np.abs(noise).max() <= CUT
    assert abs(noise.std() - 0.98658) < 0.006


def test_it_shares_nothing_with_the_noise_that_tokens_are_drawn_with() -> None:
    gumbel = gumbel_noise_numpy(3, 5, 2000)
    normal = state_noise(3, 5, 1, 2000)[0]
    assert abs(np.corrcoef(gumbel, normal)[0, 1]) < 0.12  # 5 deviations
