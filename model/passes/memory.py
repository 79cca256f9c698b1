"""How much memory the K/V cache may take beside all else: the weights, the passes, other processes.

A cache is planned once and filled later, page by page, so what is planned is what it will come to take.
Invariant: weights, planned cache and the largest pass fit together in what this machine, or the container
around the process, has free.
"""

from typing import NamedTuple

import torch

from model.machine import Memory, process_memory
from model.machine import free_memory as free_main_memory
from model.network.looped import LoopedTransformer
from model.options import SchedulerLimits

GPU_SHARE = 0.85  # of what is free; the passes' own memory comes out of the rest
SHARED_SHARE = 0.25  # of the memory of a machine that others use too
# Of what a container's limit leaves, which is for this server alone: the rest is for requests on their way,
# their answers and grammars.
OWN_SHARE = 0.7
FIXED_BYTES = 64 * 2**20  # threads, kernels, the allocator's slack; 40 MB were measured (embedded model)
LOGITS_COPIES = 4  # of a readout's logits while it is filtered and drawn from, each in four bytes


def free_memory(device: torch.device) -> Memory:
    """What may still be taken of a device's memory."""
    if device.type == "cuda":
        return Memory(torch.cuda.mem_get_info(device)[0], False)
    return free_main_memory()


class HeldMemory(NamedTuple):
    """Bytes that this process holds now, in main memory and of a GPU's (0 where the device is a CPU)."""

    resident: int
    device: int


def held_memory(device: str) -> HeldMemory:
    """What the metrics say; 0 where the system has no /proc to read it from."""
    on_device = torch.cuda.memory_reserved(device) if device.startswith("cuda") else 0
    try:
        return HeldMemory(process_memory(), on_device)
    except OSError:
        return HeldMemory(0, on_device)


def pass_bytes(model: LoopedTransformer, limits: SchedulerLimits) -> int:
    """What the largest pass takes while it runs: activations of its rows, logits of its readouts."""
    config = model.config
    whole_prompt = config.max_positions if config.prefix_lm or config.encoder else 0  # read in one piece
    rows = max(limits.most_prompt_rows, whole_prompt) + limits.max_num_seqs * config.most_loops
    width = 8 * config.hidden_size + 3 * config.intermediate_size
    width += 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    readouts = 2 * limits.max_num_seqs + limits.prefill_chunk_size
    logits = readouts * config.vocab_size * LOGITS_COPIES * 4
    return FIXED_BYTES + rows * width * max(4, model.dtype.itemsize) + logits


def cache_memory(
    model: LoopedTransformer, device: torch.device, limits: SchedulerLimits, to_come: int = 0
) -> int:
    """Bytes of a device that a model's K/V cache may take, if `to_come` more (weights, say) come first."""
    memory = free_memory(device)
    if device.type == "cuda":
        return max(0, int((memory.free - to_come) * GPU_SHARE))
    share = OWN_SHARE if memory.is_limited else SHARED_SHARE
    return max(0, int((memory.free - to_come - pass_bytes(model, limits)) * share))
