"""The types that K/V is held in: what a head's numbers take, and how they are rounded when they are written.

A number is rounded once and read back by every row alike, so that a text depends on the type, but neither on
what else runs nor on speculation. `src/attention.cpp` does the same for native passes.
"""

import torch
from torch import Tensor

from model.options import KVCacheDtypeName

KV_DTYPES: dict[KVCacheDtypeName, torch.dtype] = {  # "auto" is the backend's own
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
SCALE_BYTES = 4  # in int8: one scale for each position and head of K, and one of V
_MOST_INT8 = 127


def head_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """What K or V of one position and head takes."""
    return head_dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (..., head_dim) in int8, and the scale of each head (..., 1) in fp32.

    The largest of a head stands at 127 or -127. If one is infinite or none at all, the scale is no number.
    """
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True) / _MOST_INT8 + (wide - wide).sum(-1, keepdim=True)
    steps = torch.where(scales > 0, wide / scales, torch.zeros_like(wide)).round()
    return steps.clamp(-_MOST_INT8, _MOST_INT8).to(torch.int8), scales


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in a type of floating point; what fp16 can't hold becomes the largest that it can."""
    if dtype == torch.float16 and x.dtype != torch.float16:
        most = torch.finfo(torch.float16).max
        x = x.clamp(-most, most)
    return x.to(dtype)


def read_back(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What is read of K or V (..., head_dim) that was held in a type, in the type that it came in."""
    if dtype == torch.int8:
        numbers, scales = to_int8(x)
        return (numbers * scales).to(x.dtype)
    return narrowed(x, dtype).to(x.dtype)
