"""The families of checkpoints that can be served, one file each.

Knows nothing about files or tensors; `model.loader` brings both. Invariant: only families proven equal
to their reference are listed here.
"""

from collections.abc import Collection, Mapping
from typing import Any

from model.config import ConfigError
from model.families import iquest, llama, nanbeige, ouro, raven
from model.families.family import Family, Part, Place, WeightTable

__all__ = ["FAMILIES", "Family", "Part", "Place", "WeightTable", "families_of", "family_of"]

FAMILIES = (
    llama.FAMILY,
    nanbeige.FAMILY,
    ouro.FAMILY,
    iquest.FAMILY,
    raven.HUGINN,
    raven.LLAMA,
    raven.OLMO,
)


def families_of(raw: Mapping[str, Any]) -> tuple[Family, ...]:
    """The families that a config.json's content may belong to; raises ConfigError listing the served ones.

    `architectures` decides where it is given: other classes of the same model_type (without a head,
    with a classifier) store other tensors.
    """
    names = raw.get("architectures")
    if names:
        name = names[0] if isinstance(names, list) and len(names) == 1 else None
        found = tuple(family for family in FAMILIES if name in family.architectures)
        served = {name for family in FAMILIES for name in family.architectures}
    else:
        found = tuple(family for family in FAMILIES if family.model_type == raw.get("model_type"))
        served = {family.model_type for family in FAMILIES}
    if not found:
        key = "architectures" if names else "model_type"
        raise ConfigError(f"{key} is {raw.get(key)!r}; {', '.join(sorted(served))} can be served")
    return found


def family_of(raw: Mapping[str, Any], names: Collection[str] = ()) -> Family:
    """The family of a config.json's content and the names of its tensors; raises ConfigError."""
    found = families_of(raw)
    fitting = [family for family in found if family.fits(names)]
    if len(fitting) != 1:
        raise ConfigError(f"the tensors' names are of no one of {', '.join(family.name for family in found)}")
    return fitting[0]
