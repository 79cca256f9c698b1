"""What arithmetic torch has on a device."""

import platform

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether torch's bf16 products are worth having on a device: on a CPU only with instructions of its own.

    Without (AVX2; EPYC, 2048 x 512 x 1536 by one thread) they run at 1 GFLOPS, those of fp32 at 60.
    """
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
