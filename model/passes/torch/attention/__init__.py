"""Attention over the paged KV cache: one signature, several implementations, tested equal."""

from importlib.util import find_spec

from model.passes.torch.attention.gathered import GatheredAttention
from model.passes.torch.attention.invariant import InvariantAttention
from model.passes.torch.attention.store import KVStore, PagedAttention
from model.passes.torch.attention.viewed import ViewedAttention


def attention_for(store: KVStore, row_invariant: bool = False) -> PagedAttention:
    """The fastest implementation for the device that holds the cache.

    `row_invariant` asks for one whose result for a row depends on that row alone.
    """
    if row_invariant:
        return InvariantAttention(store)
    if store.device.type == "cpu":
        return ViewedAttention(store)
    if find_spec("triton") is None:
        return GatheredAttention(store)
    from model.passes.cuda.triton_paged import TritonAttention  # noqa: PLC0415, only where there is a GPU

    return TritonAttention(store)


__all__ = [
    "GatheredAttention",
    "InvariantAttention",
    "KVStore",
    "PagedAttention",
    "ViewedAttention",
    "attention_for",
]
