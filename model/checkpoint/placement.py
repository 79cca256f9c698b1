"""Which tensor on disk fills which parameter, and all that keeps them from fitting, before anything is read.

Knows families only through their tables, and tensors only by name, shape and dtype. Invariant: what is
neither in `places` nor in `scales` is dropped on purpose, or has a line in `problems`.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from model.checkpoint.families import Family, Place
from model.checkpoint.files import StoredTensor
from model.checkpoint.int8 import INT8, can_be_int8, scale_misfits, scale_name
from model.network.config import LoopedConfig

EMBEDDING, HEAD = "embedding.weight", "head.weight"
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")


class Match(NamedTuple):
    """Stored name -> place, the scales of int8 matrices whose headers fit, and what is wrong, a line each."""

    places: dict[str, Place]
    scales: dict[str, StoredTensor]
    problems: list[str]


def is_tied_head(config: LoopedConfig, place: Place) -> bool:
    """Whether the place is the embedding's by another name."""
    return config.tie_embeddings and place.parameter == HEAD


def match(
    family: Family,
    config: LoopedConfig,
    parameters: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    int8: bool,
) -> Match:
    """Tensors on disk against the parameters of a model; `int8`: matrices may be int8, with scales."""
    table = {n: p for n, p in family.places(config) if p is None or p.parameter in parameters}
    if config.tie_embeddings:
        table = _with_embedding_from_head(table, stored)
    places = {name: place for name, place in table.items() if place and name in stored}
    matrices = [n for n in places if int8 and stored[n].dtype == INT8 and can_be_int8(n, stored[n].shape)]
    known = table.keys() | {scale_name(name) for name in matrices}
    problems = [
        *(f"missing: {n}" for n, p in table.items() if p and n not in stored and not is_tied_head(config, p)),
        *(f"unexpected: {name}" for name in stored if name not in known),
    ]
    for name, place in places.items():
        problems += _misshapen(name, place, stored[name], parameters, config)
        problems += () if name in matrices else _mistyped(name, stored[name])
    misfits = {name: list(scale_misfits(name, stored)) for name in matrices}
    fitting = [scale_name(name) for name, lines in misfits.items() if not lines]
    return Match(
        places,
        {name: stored[name] for name in fitting},
        [*problems, *(line for lines in misfits.values() for line in lines)],
    )


def name_of(parameter: str, family: Family) -> str:
    """The name on disk of a tensor that fills a parameter outside of a family's layers."""
    return next(name for name, place in family.weights.items() if place and place.parameter == parameter)


def _with_embedding_from_head(
    table: dict[str, Place | None], stored: Mapping[str, StoredTensor]
) -> dict[str, Place | None]:
    """The table of a tied model; the head's tensor fills the embedding where that is stored alone."""
    names = {place.parameter: name for name, place in table.items() if place}
    head, embedding = names.get(HEAD), names.get(EMBEDDING)
    if head is None or embedding is None or head not in stored or embedding in stored:
        return table
    return {head if name == embedding else name: place for name, place in table.items() if name != head}


def _misshapen(
    name: str, place: Place, stored: StoredTensor, parameters: Mapping[str, Tensor], config: LoopedConfig
) -> Iterator[str]:
    filled = tuple(parameters[place.parameter][place.rows(config)].shape)
    wanted = place.shape(config) if place.shape else filled
    if stored.shape != wanted:
        yield f"shape: {name} is {list(stored.shape)}, {list(wanted)} is wanted"


def _mistyped(name: str, stored: StoredTensor) -> Iterator[str]:
    if stored.dtype not in _STORED_DTYPES:
        matrix = stored.dtype == INT8 and can_be_int8(name, stored.shape)
        hint = " (a matrix in I8 too, if config.json has a quantization_config)" if matrix else ""
        yield f"dtype: {name} is {stored.dtype}; {', '.join(_STORED_DTYPES)} can be read{hint}"
