"""What a checkpoint's tensors say where its config.json is silent, or says what they contradict.

Decides as transformers does when it loads the same folder, so that a model is served wherever it would run
there. Invariant: nothing is made up. A tensor that the text depends on and that no other one stands for stays
missing, which is the loader's error.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from model.checkpoint.families import Family
from model.checkpoint.files import StoredTensor, read_tensors
from model.checkpoint.int8 import scale_name
from model.checkpoint.placement import EMBEDDING, HEAD, name_of
from model.network.config import LoopedConfig

log = logging.getLogger(__name__)

GATE_PARTS = ("gate.weight", "gate.bias")
TIE_KEYS = ("tie_word_embeddings", "tie_embeddings")


def amended(
    config: LoopedConfig, family: Family, raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> LoopedConfig:
    """The config that fits the stored tensors, of a family whose config.json holds `raw`.

    Raises CheckpointError if an embedding and a head have to be compared and cannot be read.
    """
    return _without_gate(_with_head(config, family, raw, stored), family, stored)


def _with_head(
    config: LoopedConfig, family: Family, raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> LoopedConfig:
    """A stored head that differs is one of its own; where none is stored, silence means the embedding."""
    head, embedding = name_of(HEAD, family), name_of(EMBEDDING, family)
    if config.tie_embeddings and {head, embedding} <= stored.keys() and _differ(head, embedding, stored):
        log.warning(
            "config.json ties %s to %s, but both are stored and differ: each is used as it is",
            head,
            embedding,
        )
        return replace(config, tie_embeddings=False)
    is_silent = all(raw.get(key) is None for key in TIE_KEYS)
    if not config.tie_embeddings and is_silent and embedding in stored and head not in stored:
        log.warning(
            "%s is not stored, and config.json does not say whether it is %s: it is taken to be",
            head,
            embedding,
        )
        return replace(config, tie_embeddings=True)
    return config


def _without_gate(config: LoopedConfig, family: Family, stored: Mapping[str, StoredTensor]) -> LoopedConfig:
    """An exit gate decides nothing while every token runs all loops, so a checkpoint may come without it."""
    if not config.exit_gate or any(name_of(part, family) in stored for part in GATE_PARTS):
        return config
    log.warning("the exit gate is not stored: the model is loaded without it, which changes no text")
    return replace(config, exit_gate=False)


def _differ(first: str, second: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether two tensors, or the scales of two int8 matrices, are not the same numbers in the same type."""
    pairs = [(first, second)]
    scales = scale_name(first), scale_name(second)
    if any(name in stored for name in scales):
        pairs.append(scales)
    for names in pairs:
        tensors = [stored.get(name) for name in names]
        one, other = tensors
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            return True
        pieces = (read_tensors({name: stored[name]}) for name in names)
        for a, b in zip_longest(*pieces):
            if not torch.equal(a.rows, b.rows):
                return True
    return False
