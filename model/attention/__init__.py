"""Attention over the paged KV cache: one signature, several implementations, tested equal."""

import torch

from model.attention.gathered import GatheredAttention
from model.attention.store import KVStore, PagedAttention
from model.attention.viewed import ViewedAttention


def attention_for(store: KVStore) -> PagedAttention:
    """The fastest implementation for the device that holds the cache."""
    return ViewedAttention(store) if store.device == torch.device("cpu") else GatheredAttention(store)


__all__ = ["GatheredAttention", "KVStore", "PagedAttention", "ViewedAttention", "attention_for"]
