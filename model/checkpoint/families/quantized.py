"""`quantization_config` in a config.json: which quantised checkpoints are read, whatever their family.

Knows nothing about tensors or families. Follows the format `int-quantized` of compressed-tensors, weights
alone. Which matrices are quantised is for the files to say: `targets` and `ignore` are not read.
Invariant: an option that would change a number is either read or refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from model.checkpoint.families.family import Fields
from model.network.config import ConfigError

METHOD, FORMAT = "compressed-tensors", "int-quantized"
SUPPORTED = f"{METHOD} in the format {FORMAT}, weights alone: int8, symmetric, a scale per output channel"

NVFP4 = (
    "weights in NVFP4 are not read: no reference was at hand to prove their layout by. Take the same model's "
    "checkpoint in BF16, and --quantization int8 where memory is short"
)

# What a field may be, None standing for an absent one too. Fields that are in neither table must be empty.
_FIELDS: dict[str, tuple[Any, ...]] = {
    "quant_method": (METHOD,),
    "format": (FORMAT,),
    "quantization_status": (None, "compressed"),
}
_GROUP_FIELDS: dict[str, tuple[Any, ...]] = {"format": (None, FORMAT)}
_WEIGHT_FIELDS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("channel",),
    "dynamic": (None, False),
    "group_size": (None, -1),
    "actorder": (None, False, "weight", "static"),  # the order of calibration, not of channels
}
# What is read elsewhere, or says how the numbers were found.
_FREE = frozenset(
    {
        "config_groups",
        "global_compression_ratio",
        "ignore",
        "observer",
        "observer_kwargs",
        "run_compressed",
        "scale_dtype",
        "sparsity_config",
        "targets",
        "version",
        "weights",
        "zp_dtype",
    }
)


def stored_in_int8(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json's content says int8 matrices; ConfigError for any other quantisation."""
    if not raw.get("quantization_config"):
        return False
    fields = Fields(raw).section("quantization_config")
    if "nvfp4" in repr(fields.raw).lower():
        raise fields.wrong("quant_method", NVFP4)
    _check(fields, _FIELDS)
    if fields.section("sparsity_config").text("format", "dense") != "dense":
        raise _not_read(fields, "sparsity_config")
    groups = fields.section("config_groups")
    if not groups.raw:
        raise fields.wrong("config_groups", f"a group of weights is wanted; supported: {SUPPORTED}")
    for name in groups.raw:
        group = groups.section(name)
        _check(group, _GROUP_FIELDS)
        _check(group.section("weights"), _WEIGHT_FIELDS)
    return True


def int8_fields(ignored: Sequence[str] = ()) -> dict[str, Any]:
    """What `stored_in_int8` reads, for a config.json whose matrices are written in int8, but for some."""
    weights = {key: values[0] for key, values in _WEIGHT_FIELDS.items()} | {"dynamic": False}
    group = {"targets": ["Linear", "Embedding"], "weights": weights, "input_activations": None}
    fixed = {key: values[-1] for key, values in _FIELDS.items()}
    return {"quantization_config": {**fixed, "config_groups": {"group_0": group}, "ignore": [*ignored]}}


def _check(fields: Fields, table: Mapping[str, tuple[Any, ...]]) -> None:
    for key, possible in table.items():
        value = fields.raw.get(key)
        if not any(type(value) is type(one) and value == one for one in possible):
            raise _not_read(fields, key)
    for key in sorted(fields.raw.keys() - table.keys() - _FREE):
        if fields.raw[key]:
            raise _not_read(fields, key)


def _not_read(fields: Fields, key: str) -> ConfigError:
    return fields.wrong(key, f"quantised checkpoints are read only as {SUPPORTED}")
