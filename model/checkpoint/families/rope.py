"""The rotary embedding in a config.json, in the styles of transformers 4 and 5.

Knows nothing about the formulas (`layers.rotary_frequencies` has them) or the rest of the config.
Invariant: a field or kind that would change a frequency is either read or refused.
"""

import math
from typing import Any

from model.checkpoint.families.family import Fields
from model.network.config import ConfigError, RopeConfig

_KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("partial_rotary_factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("short_factor", "long_factor"),
}


def read_rope(fields: Fields) -> tuple[int, RopeConfig]:
    """The longest context in tokens and the rotary embedding; raises ConfigError naming the field."""
    longest = fields.integer("max_position_embeddings", 2048)
    scaling = _scaling(fields)
    kind = _kind(scaling)
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0, above=1.0), above=1.0)
    # As in transformers, a length beside the rope's own fields wins over the one inside them.
    holder = fields if fields.has("original_max_position_embeddings") else scaling
    original = holder.integer("original_max_position_embeddings", longest)
    if kind == "dynamic":
        # Dynamic NTK is the plain embedding up to the original context. Beyond it every angle depends
        # on the length of the whole text, so a cached key would go stale: serve it up to there.
        scaling.number("factor")
        return min(longest, original), RopeConfig(theta=theta)
    if kind == "longrope":
        # The same holds here: beyond the original context the reference turns to long_factor for all.
        scaling.numbers("long_factor")
        rope = RopeConfig(theta=theta, kind=kind, **_longrope(scaling, longest, original))
        return min(longest, original), rope
    return longest, RopeConfig(theta=theta, kind=kind, **_options(kind, scaling, longest, original))


def write_rope(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` that reads back as this embedding, but for theta; None where none is needed."""
    by_kind: dict[str, dict[str, Any]] = {
        "linear": {"type": "linear", "factor": rope.factor},
        "llama3": {
            "rope_type": "llama3",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_positions,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        },
        "yarn": {
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_positions,
            "attention_factor": rope.attention_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
            "truncate": rope.truncate,
        },
    }
    return by_kind.get(rope.kind)


def _scaling(fields: Fields) -> Fields:
    """The nested object: rope_scaling where given (it wins, as in transformers), else rope_parameters."""
    scaling = fields.section("rope_scaling")
    scaling = scaling if scaling.raw else fields.section("rope_parameters")
    for place in (fields, scaling):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.wrong("partial_rotary_factor", "the classes of these families rotate whole heads")
    return scaling


def _kind(scaling: Fields) -> str:
    """The kind of scaling, checked before the other fields: an unknown kind has unknown fields."""
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in _KINDS:
        raise ConfigError(f"{scaling.prefix}rope_type is {kind!r}; only {', '.join(_KINDS)} are supported")
    for key in sorted(scaling.raw.keys() - _KEYS):
        raise scaling.wrong(key, "this field is not supported")
    return kind


def _options(kind: str, scaling: Fields, longest: int, original: int) -> dict[str, Any]:
    """What the kind reads beside theta, as arguments of RopeConfig."""
    if kind == "default":
        return {}
    if kind == "linear":
        return {"factor": scaling.number("factor")}
    if kind == "llama3":
        return {"original_max_positions": original, **_llama3(scaling)}
    factor = scaling.number("factor", longest / original)
    return {"original_max_positions": original, "factor": factor, **_yarn(scaling)}


def _llama3(scaling: Fields) -> dict[str, float]:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise scaling.wrong("high_freq_factor", f"it must be greater than low_freq_factor, {low:g}")
    return {"factor": scaling.number("factor"), "low_freq_factor": low, "high_freq_factor": high}


def _longrope(scaling: Fields, longest: int, original: int) -> dict[str, Any]:
    """Frequencies divided one by one, and the attention factor of LongRoPE (arXiv 2402.13753)."""
    factor = scaling.number("factor", longest / original)
    implied = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    return {
        "divisors": scaling.numbers("short_factor"),
        "attention_factor": scaling.number("attention_factor", implied),
    }


def _yarn(scaling: Fields) -> dict[str, Any]:
    fast, slow = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
    if fast < slow:
        raise scaling.wrong("beta_fast", f"it must not be less than beta_slow, {slow:g}")
    return {
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": scaling.flag("truncate", True),
        **{key: scaling.optional_number(key) for key in ("attention_factor", "mscale", "mscale_all_dim")},
    }
