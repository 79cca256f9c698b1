"""How fast this machine reads memory, and how much of it a pass must read: the least time a pass can take."""

import time
from typing import NamedTuple

import torch
from torch import nn

from model.network.looped import LoopedTransformer

BUFFER_BYTES = 2 * 2**30  # far beyond any cache
REPEATS = 5


class WeightReading(NamedTuple):
    """A pass against one reading of the weights it multiplies with. Bytes, bytes per second, seconds."""

    weight_bytes: int
    bytes_per_second: float
    pass_seconds: float

    @property
    def share(self) -> float:
        """The share of a pass that reading its weights alone would take."""
        return self.weight_bytes / self.bytes_per_second / self.pass_seconds

    def __str__(self) -> str:
        least = self.weight_bytes / self.bytes_per_second
        return (
            f"a pass multiplies with {self.weight_bytes / 1e9:.3f} GB of weights; reading them at the "
            f"{self.bytes_per_second / 1e9:.1f} GB/s that a plain sum over memory reaches takes "
            f"{least * 1e3:.2f} ms, {self.share:.0%} of a pass"
        )


def memory_bandwidth(device: torch.device, size: int = BUFFER_BYTES) -> float:
    """Bytes per second at which a sum reads a large buffer of so many bytes: the best of a few tries."""
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        float(buffer.sum())  # waits for the device
        best = min(best, time.perf_counter() - started)
    return buffer.nbytes / best


def weight_bytes_of_a_pass(skeleton: LoopedTransformer, dtype: torch.dtype, quantization: str) -> int:
    """Bytes of all matrices that a pass with a readout multiplies with; the embedding is only looked up."""
    matrices = [m.weight for m in skeleton.modules() if isinstance(m, nn.Linear) and m.out_features > 1]
    itemsize = 1 if quantization == "int8" else dtype.itemsize
    return sum(weight.numel() for weight in matrices) * itemsize
