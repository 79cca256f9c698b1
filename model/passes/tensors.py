"""From numbers of the host to tensors of a device, without a wait."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host numbers on `device`; through pinned memory, so that no stream is waited for."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def array_to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """An array as a tensor on `device`; on a CPU it is not copied."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
