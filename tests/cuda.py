"""Small shapes for the operations of the cuda backend, in Triton's interpreter where there is no GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.network.config import LoopedConfig
from model.network.int8 import quantized
from model.network.layers import Rotary
from model.passes.cuda.operations import Cache, Places, Shape, Tile
from model.passes.cuda.weights import Matrix
from tests.loose import Field
from tests.tiny_models import tiny_config

PAGE, POSITIONS, CELLS = 16, 64, 96
TILE = Tile(rows=16, columns=32, inputs=16, positions=16, slots=2)  # small, so that nothing fits in one
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

# For tests of kernels: where there is a GPU they run on it, with what `pytest -m gpu` runs.
KERNELS = [pytest.mark.usefixtures("interpreter"), *([pytest.mark.gpu] if ON_GPU else [])]


@pytest.fixture(scope="module", name="interpreter")
def fast_interpreter() -> Iterator[None]:
    """Without looks for overflows, which take most of the interpreter's time."""
    if ON_GPU:
        yield
        return
    from triton.runtime import interpreter  # noqa: PLC0415, conftest has asked for the interpreter by now

    builder, before = interpreter.interpreter_builder, interpreter.interpreter_builder.options
    builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    yield
    builder.options = before


def shape_of(dtype: torch.dtype = torch.float32, **changes: Field) -> Shape:
    """What operations know of a tiny model."""
    config = tiny_config(**changes)
    cosines, sines = Rotary(config)(torch.arange(POSITIONS, device=DEVICE), torch.float32)
    return Shape(config, dtype, cosines.flatten(1), sines.flatten(1), PAGE)


def numbers(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    drawn = torch.randn(*size, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE, dtype)


def matrix_of(outputs: int, inputs: int, kind: str, *, biases: bool = False) -> Matrix:
    """A matrix in fp32, bf16 or int8."""
    weight = numbers(outputs, inputs, seed=1) / inputs**0.5
    bias = numbers(outputs, seed=2) if biases else None
    if kind == "int8":
        return Matrix(*quantized(weight), bias)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return Matrix(weight.to(dtype), None, None if bias is None else bias.to(dtype))


def places_of(positions: list[int], loops: list[int]) -> Places:
    """Rows of two sequences in turn, whose pages lie crosswise; a position of -1 is a row of nothing."""
    pages = [[0, 3, 1], [4, 2, 5]]  # the last cell of CELLS belongs to no page
    cells = [
        pages[row % 2][p // PAGE] * PAGE + p % PAGE if p >= 0 else CELLS for row, p in enumerate(positions)
    ]
    columns = (
        [max(p, 0) for p in positions],
        [loop * (CELLS + 1) + cell for loop, cell in zip(loops, cells, strict=True)],
        [loop * (CELLS + 1) for loop in loops],
        [3 * (row % 2) for row in range(len(positions))],
        [p + 1 for p in positions],
        pages[0] + pages[1],
    )
    return Places(*(torch.tensor(column, device=DEVICE) for column in columns))


def rows_of(places: Places, chosen: slice) -> Places:
    """Some of the rows."""
    return Places._make([*(column[chosen].contiguous() for column in places[:-1]), places.pages])


def cache_of(config: LoopedConfig, dtype: torch.dtype = torch.float32) -> Cache:
    """K and V of one layer, all entries filled."""
    size = (config.num_loops * (CELLS + 1), config.num_kv_heads, config.head_dim)
    return Cache(numbers(*size, seed=3, dtype=dtype), numbers(*size, seed=4, dtype=dtype))
