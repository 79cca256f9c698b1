"""Muon in fp32, for CPUs without bf16 products: torch's own rounds to bf16 whatever the machine.

There it is slow beyond use (AVX2, EPYC: a product of 2048 x 512 x 1536 at 1 GFLOPS, 60 in fp32; three
quarters of a training step). Knows nothing about models. Invariant: state and hyperparameters are
`torch.optim.Muon`'s, so that a run may resume on the other kind of machine.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al. 2024) whose updates are orthogonalised in fp32."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # a closure is of no use in this project
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = cast(Tensor, parameter.grad), self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer, momentum = state["momentum_buffer"], group["momentum"]
        buffer.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """About the U V^T of a matrix U S V^T, same shape: singular values between 0.7 and 1.2 instead of S.

    `steps` Newton-Schulz iterations of x <- a x + b (x x^T) x + c (x x^T)^2 x; `coefficients` are (a, b, c).
    """
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T
