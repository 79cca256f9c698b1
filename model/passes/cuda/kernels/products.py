"""Products of rows with a weight matrix, in tiles of one shape whatever the number of rows.

Knows nothing about layers. Invariant: an output is summed over inputs in one order, which depends on the
matrix and the tile alone, so a row's bits never depend on the other rows of its tile or on their number.
Scales of int8 weights and biases come last, by `finished`, where a product is read.
"""

import triton
import triton.language as tl


@triton.jit
def _operands(x, w, row, column, inner, num_rows, num_columns, num_inputs, end, WIDEN: tl.constexpr):
    """A tile of rows (ROWS, INPUTS), and one of weights, transposed (INPUTS, COLUMNS)."""
    within = inner < end
    a = tl.load(
        x + row[:, None] * num_inputs + inner[None, :],
        mask=(row < num_rows)[:, None] & within[None, :],
        other=0.0,
    )
    b = tl.load(
        w + column[None, :] * num_inputs + inner[:, None],
        mask=(column < num_columns)[None, :] & within[:, None],
        other=0.0,
    )
    # Triton's interpreter takes the bits of bf16 numbers for integers: there all are multiplied in fp32.
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    else:
        b = b.to(a.dtype)
    return a, b


@triton.jit(do_not_specialize=["num_rows"])
def product(
    x,
    w,
    parts,
    num_rows,
    num_columns,
    num_inputs,
    part_size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Sums over a part of the inputs each: x (rows, inputs), w (columns, inputs), parts (p, rows, columns).

    Programs: a tile of rows, a tile of columns, a part. Those of one tile of weights run side by side.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2).to(tl.int64)
    end = tl.minimum((part + 1) * part_size, num_inputs)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(part * part_size, end, INPUTS):
        inner = start + tl.arange(0, INPUTS)
        a, b = _operands(x, w, row, column, inner, num_rows, num_columns, num_inputs, end, WIDEN)
        total = tl.dot(a, b, total, input_precision="ieee")
    at = parts + (part * num_rows + row[:, None]) * num_columns + column[None, :]
    tl.store(at, total, mask=(row < num_rows)[:, None] & (column < num_columns)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def gated(
    x,
    w,
    scales,
    biases,
    out,
    num_rows,
    num_columns,
    num_inputs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """silu(gate x) * up x: w (2 * columns, inputs) has the gates before the ups; out (rows, columns)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    ups = w + num_inputs.to(tl.int64) * num_columns
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_inputs, INPUTS):
        inner = start + tl.arange(0, INPUTS)
        a, b = _operands(x, w, row, column, inner, num_rows, num_columns, num_inputs, num_inputs, WIDEN)
        _, c = _operands(x, ups, row, column, inner, num_rows, num_columns, num_inputs, num_inputs, WIDEN)
        gate = tl.dot(a, b, gate, input_precision="ieee")
        up = tl.dot(a, c, up, input_precision="ieee")
    known = column < num_columns
    if scales is not None:
        gate = gate * tl.load(scales + column, mask=known, other=0.0)[None, :]
        up = up * tl.load(scales + num_columns + column, mask=known, other=0.0)[None, :]
    if biases is not None:
        gate = gate + tl.load(biases + column, mask=known, other=0.0).to(tl.float32)[None, :]
        up = up + tl.load(biases + num_columns + column, mask=known, other=0.0).to(tl.float32)[None, :]
    inside = gate / (1.0 + tl.exp(-gate)) * up
    at = out + row[:, None] * num_columns + column[None, :]
    tl.store(at, inside.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & known[None, :])


@triton.jit
def finished(parts, scales, biases, more, row, at, mask, num_rows, width, PARTS: tl.constexpr):
    """The channels `at` of a row of a product (PARTS, rows, width): parts added up, scaled, biased.

    `more` are further biases; what is None is left out.
    """
    y = tl.zeros(at.shape, tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(parts + (part * num_rows + row) * width + at, mask=mask, other=0.0)
    if scales is not None:
        y = y * tl.load(scales + at, mask=mask, other=0.0)
    if biases is not None:
        y = y + tl.load(biases + at, mask=mask, other=0.0).to(tl.float32)
    if more is not None:
        y = y + tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
    return y
