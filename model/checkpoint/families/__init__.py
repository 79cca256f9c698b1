"""The families of checkpoints that can be served, one file each.

Knows nothing about files or tensors; `model.checkpoint.loader` brings both. Invariant: only families
proven equal to their reference are listed here.
"""

from collections.abc import Collection, Mapping
from typing import Any

from model.checkpoint.families import dory, hrm, iquest, llama, nanbeige, ouro, raven, t5
from model.checkpoint.families.family import Family, Layout, Part, Place, TurnEnd, WeightTable
from model.network.config import ConfigError, LoopedConfig

__all__ = [
    "FAMILIES",
    "Family",
    "Layout",
    "Part",
    "Place",
    "TurnEnd",
    "WeightTable",
    "families_of",
    "family_of",
    "layout_of",
]

FAMILIES = (
    llama.FAMILY,
    nanbeige.FAMILY,
    ouro.FAMILY,
    iquest.FAMILY,
    raven.HUGINN,
    raven.LLAMA,
    raven.OLMO,
    dory.FAMILY,
    hrm.FAMILY,
    t5.LOOPED_FAMILY,
    t5.PLAIN_FAMILY,
)

_INKLING = (
    "its looped layers are mixtures of experts, so tokens in flight share the reads of attention but hardly "
    "those of experts, and speculation over its 3 passes saves at most about 1.4x. It would take block "
    "attention residuals, convolutions whose inputs are kept by position, relative biases and routed experts"
)
_SENSENOVA = (
    "three of its four layers are linear attention, whose state is a sum over positions: a wrong draft can't "
    "be taken back by position. It would take the modelling file, which is not public, a state kept for each "
    "token in flight, and hyper-connections"
)
_PARCAE = (
    "its weights are pickles, which can run code and are never loaded. It would take a conversion to "
    "safetensors, and its state-space loop and value embeddings in this engine"
)
# Looped models that people may try, by architecture and model_type, and why they can't be served.
_NOT_SERVED = {
    "Inkling2LoopForConditionalGeneration": _INKLING,
    "Inkling2LoopForCausalLM": _INKLING,
    "inkling2_loop": _INKLING,
    "inkling2_loop_text": _INKLING,
    "sensenova_loop": _SENSENOVA,
    "parcae": _PARCAE,
}


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
        raise ConfigError(f"{key} is {value!r}; {', '.join(sorted(served))} can be served{_reason(raw)}")
    return found


def _reason(raw: Mapping[str, Any]) -> str:
    """Why a model that its architecture or model_type names is not served, if that is known."""
    names = raw.get("architectures")
    given = [*(names if isinstance(names, list) else ()), raw.get("model_type")]
    known = [name for name in given if isinstance(name, str) and name in _NOT_SERVED]
    return f". {known[0]}: {_NOT_SERVED[known[0]]}" if known else ""


def family_of(raw: Mapping[str, Any], names: Collection[str] = ()) -> Family:
    """The family of a config.json's content and the names of its tensors; raises ConfigError."""
    found = families_of(raw)
    fitting = [family for family in found if family.fits(names)]
    if len(fitting) != 1:
        raise ConfigError(f"the tensors' names are of no one of {', '.join(family.name for family in found)}")
    return fitting[0]


def layout_of(config: LoopedConfig) -> tuple[Family, Layout]:
    """The family that a model of ours is saved as one of, and how; raises ValueError where there is none."""
    for family in FAMILIES:
        if family.layout is not None and family.layout.holds(config):
            return family, family.layout
    raise ValueError(f"no layout holds a {config.family} model such as {config}")
