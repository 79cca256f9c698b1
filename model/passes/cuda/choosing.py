"""Whether the cuda backend can run a model on a device, found out before weights are read.

Imports Triton only where there is a GPU to try it on. Invariant: where this gives a maker, a kernel has been
compiled and has run on the device.
"""

from importlib.util import find_spec

import torch

from model.network.config import LoopedConfig
from model.passes.backend import BackendMaker
from model.passes.cuda.weights import CudaUnavailableError, check_covered


def cuda_maker(config: LoopedConfig, device: torch.device) -> BackendMaker:
    """The maker for a model on a device. Raises CudaUnavailableError, with the reason, where it can't run."""
    if device.type != "cuda":
        raise CudaUnavailableError(f"the device is {device}, not an NVIDIA GPU")
    check_covered(config)
    if find_spec("triton") is None:
        raise CudaUnavailableError("Triton, which compiles its kernels, is not installed")
    from model.passes.cuda.backend import CudaOptions  # noqa: PLC0415, only where there is a GPU
    from model.passes.cuda.trial import run_a_kernel  # noqa: PLC0415

    try:
        run_a_kernel(device)
    except Exception as error:  # no compiler, no driver, an old GPU: Triton raises whatever these raise
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise CudaUnavailableError(
            f"Triton can't run a kernel there, {type(error).__name__}: {reason} (it compiles a launcher with "
            "the C compiler that CC names, gcc or clang, when it is first used)"
        ) from error
    return CudaOptions()


__all__ = ["CudaUnavailableError", "cuda_maker"]
