"""Attention over the paged KV cache: one signature, two implementations, tested equal."""

from importlib.util import find_spec

from torch import Tensor

from model.passes.torch.attention.gathered import GatheredAttention
from model.passes.torch.attention.store import KVStore, PagedAttention


def attention_for(store: KVStore, relative: Tensor | None = None) -> PagedAttention:
    """Triton's for a GPU that has it, else the reference; that too where scores are biased by `relative`."""
    if store.device.type == "cpu" or find_spec("triton") is None or relative is not None:
        return GatheredAttention(store, relative)
    from model.passes.cuda.triton_paged import TritonAttention  # noqa: PLC0415, only where there is a GPU

    return TritonAttention(store)


__all__ = ["GatheredAttention", "KVStore", "PagedAttention", "attention_for"]
