"""int8 matrices on disk: the two tensors that stand for one, `X.weight` and its scales `X.weight_scale`.

Knows nothing about models, families or config.json. Layout of compressed-tensors' `int-quantized`: int8
(out, in), and scales (out, 1), of which (out,) is read as well. Invariant: a matrix is scale times integer,
computed in fp32; what is written is what `model.network.int8` makes of a matrix.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.checkpoint.files import StoredTensor, read_tensors
from model.network.int8 import CHUNK, quantized

INT8 = "I8"
SCALE_DTYPES = ("F32", "BF16", "F16")


def scale_name(weight: str) -> str:
    """The name of the scales of a matrix on disk."""
    return f"{weight}_scale"


def can_be_int8(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this name and shape is a matrix, and so may be stored in int8."""
    return name.endswith(".weight") and len(shape) == 2


def scale_misfits(weight: str, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """What is wrong with the header of an int8 matrix's scales, a line each."""
    name, rows = scale_name(weight), stored[weight].shape[0]
    scale = stored.get(name)
    if scale is None:
        yield f"missing: {name}, the scales of an int8 tensor"
        return
    if scale.shape not in ((rows, 1), (rows,)):
        yield f"shape: {name} is {list(scale.shape)}, {[rows, 1]} is wanted"
    if scale.dtype not in SCALE_DTYPES:
        yield f"dtype: {name} is {scale.dtype}; {', '.join(SCALE_DTYPES)} can be read"


def read_scales(stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
    """Scales by name, in fp32 (out,), of tensors whose headers fit; raises CheckpointError."""
    scales = {name: torch.empty(tensor.shape[0]) for name, tensor in stored.items()}
    for name, start, rows in read_tensors(stored):
        scales[name][start : start + len(rows)] = rows.flatten()
    return scales


def useless_scales(scales: Mapping[str, Tensor]) -> Iterator[str]:
    """A line for each tensor with scales that cannot be: not finite, or not above 0."""
    for name, scale in scales.items():
        if bad := int((~(scale.isfinite() & (scale > 0))).sum()):
            yield f"value: {bad} of {len(scale)} numbers in {name} are not finite or not above 0"


def widen(weight: Tensor, scales: Tensor, target: Tensor) -> None:
    """Writes int8 (out, in) times scales (out,) into `target` (out, in), by way of fp32."""
    for start in range(0, len(weight), CHUNK):
        part = slice(start, start + CHUNK)
        target[part] = weight[part] * scales[part, None]


def in_int8(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices by name -> what stands for them on disk: int8, and fp32 scales beside it, on the CPU."""
    written: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        weight, scales = quantized(matrix.detach())
        written |= {name: weight.cpu(), scale_name(name): scales[:, None].cpu()}
    return written
