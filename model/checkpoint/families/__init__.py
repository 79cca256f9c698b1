"""The families of checkpoints that can be served, one file each.

Knows nothing about files or tensors; `model.checkpoint.loader` brings both. Invariant: only families
proven equal to their reference are listed here.
"""

from collections.abc import Collection, Mapping
from typing import Any

from model.checkpoint.families import iquest, llama, nanbeige, ouro, raven
from model.checkpoint.families.family import Family, Part, Place, WeightTable
from model.network.config import ConfigError

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

_HRM = (
    "its prompt attends both ways (prefix_lm), so K/V of a prompt position depend on the tokens behind it, "
    "and the prompt can be neither read in chunks nor shared as a prefix; and its cycles alternate two "
    "stacks of layers, where this engine runs one block for rows at any depth"
)
# Looped models that people may try, by architecture and model_type, and why they can't be served.
_NOT_SERVED = {"HrmTextForCausalLM": _HRM, "hrm_text": _HRM}


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
        value = raw.get(key)
        only = value[0] if isinstance(value, list) and len(value) == 1 else value
        reason = f": {_NOT_SERVED[only]}" if isinstance(only, str) and only in _NOT_SERVED else ""
        raise ConfigError(f"{key} is {value!r}; {', '.join(sorted(served))} can be served{reason}")
    return found


def family_of(raw: Mapping[str, Any], names: Collection[str] = ()) -> Family:
    """The family of a config.json's content and the names of its tensors; raises ConfigError."""
    found = families_of(raw)
    fitting = [family for family in found if family.fits(names)]
    if len(fitting) != 1:
        raise ConfigError(f"the tensors' names are of no one of {', '.join(family.name for family in found)}")
    return fitting[0]
