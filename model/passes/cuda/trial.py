"""One small product on a device: whether kernels can be compiled and launched there."""

import torch

from model.passes.cuda.kernels import products

SIZE = 32


def run_a_kernel(device: torch.device) -> None:
    """Raises whatever Triton raises, and RuntimeError where the product is wrong."""
    ones = torch.ones(SIZE, SIZE, device=device)
    sums = torch.zeros(1, SIZE, SIZE, device=device)
    products.product[(1, 1, 1)](
        ones, ones, sums, SIZE, SIZE, SIZE, SIZE, ROWS=SIZE, COLUMNS=SIZE, INPUTS=SIZE, WIDEN=not ones.is_cuda
    )
    if not bool((sums == SIZE).all()):
        raise RuntimeError(f"a product of ones gave {sums.flatten()[0].item()}, not {SIZE}")
