"""The noise that a recurrent-depth model's state starts from: a function of seed and position alone.

Counter-based (Philox, Salmon et al. 2011), in a stream of its own beside the sampler's, so that a text is
the same whatever else runs, however the prompt was cut up, and after a pre-emption. Knows nothing about
requests. Invariant: computed on the host in double precision, so every device gets the same numbers.
"""

import math

import numpy as np
import torch
from torch import Tensor

CUT = 3.0  # standard deviations, as the reference's trunc_normal_
_STREAM = 1 << 128  # the third word of the counter; the sampler's noise has 0 there
_TAIL = 0.5 * math.erfc(CUT / math.sqrt(2))  # probability below -CUT


def state_noise(seed: int, start: int, count: int, size: int) -> Tensor:
    """Standard normal noise cut at +-3 for positions start .. start + count - 1, (count, size), fp32.

    By inversion of 53-bit uniform numbers; `seed` is a signed 64-bit integer.
    """
    rows = [
        np.random.Philox(key=seed % 2**64, counter=_STREAM | position << 64).random_raw(size)
        for position in range(start, start + count)
    ]
    uniform = ((np.stack(rows) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    normal: Tensor = torch.special.ndtri(torch.from_numpy(_TAIL + (1 - 2 * _TAIL) * uniform))
    return normal.clamp(-CUT, CUT).float()
