"""From the parts of a product to the state behind a sub-layer and the input of the next product.

One kernel does what stands between two products: it adds the parts up in order, applies scales and biases
of the matrix, the norm of the sub-layer's output, the state before it, the norm of the sum, and the norm that
the next product reads by. All of it in fp32. Invariant: one program has one row and sees no other.
"""

import triton
import triton.language as tl

from model.passes.cuda.kernels.products import finished


@triton.jit
def _normalised(y, weight, channel, known, eps, SIZE: tl.constexpr):
    """RMSNorm of one row, whose channels behind SIZE are zero."""
    factor = tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)
    return y * factor * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def join(
    parts,
    scales,
    biases,
    state,
    output_norm,
    sum_norm,
    next_norm,
    new_state,
    next_input,
    eps,
    num_rows,
    SIZE: tl.constexpr,
    PAD: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row of parts (PARTS, rows, SIZE), of states and of inputs, each (rows, SIZE); None is left out."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PAD)
    known = channel < SIZE
    y = finished(parts, scales, biases, None, row, channel, known, num_rows, SIZE, PARTS)
    if output_norm is not None:
        y = _normalised(y, output_norm, channel, known, eps, SIZE)
    if state is not None:
        y = tl.load(state + row * SIZE + channel, mask=known, other=0.0) + y
    if sum_norm is not None:
        y = _normalised(y, sum_norm, channel, known, eps, SIZE)
    tl.store(new_state + row * SIZE + channel, y, mask=known)
    if next_norm is not None:
        y = _normalised(y, next_norm, channel, known, eps, SIZE)
    tl.store(next_input + row * SIZE + channel, y.to(next_input.dtype.element_ty), mask=known)
