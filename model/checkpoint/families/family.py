"""What a family is: how its config.json is read, and where each of its tensors belongs in our model.

Knows nothing about tensors' contents or about any one family. Invariant: a family's table accounts
for every tensor of its checkpoints; a name that the table does not give is an error, never ignored.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from model.network.config import ConfigError, LoopedConfig

T = TypeVar("T")
MAX_FLOAT = sys.float_info.max


class Part(Enum):
    """Rows of a fused tensor: q, k, v of qkv_proj, an output gate before them; gate, up of gate_up_proj."""

    OUTPUT_GATE = "output_gate"
    Q = "q"
    K = "k"
    V = "v"
    GATE = "gate"
    UP = "up"

    def rows(self, config: LoopedConfig) -> slice:
        """Which rows of the fused tensor this part is."""
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        first = q if config.output_gate else 0
        gate = config.intermediate_size
        bounds = {
            Part.OUTPUT_GATE: (0, first),
            Part.Q: (first, first + q),
            Part.K: (first + q, first + q + kv),
            Part.V: (first + q + kv, first + q + 2 * kv),
            Part.GATE: (0, gate),
            Part.UP: (gate, 2 * gate),
        }
        return slice(*bounds[self])


class Section(Enum):
    """Which layers the numbers of a name on disk count, from 0."""

    ALL = "all"
    PRELUDE = "prelude"
    BLOCK = "block"
    CODA = "coda"
    LOW = "low"  # the two stacks of a block with `low_cycles`
    HIGH = "high"
    ENCODER = "encoder"

    def layers(self, config: LoopedConfig) -> range:
        """Indices of the section's layers in our model; the encoder counts its own."""
        ranges = {
            Section.PRELUDE: config.prelude,
            Section.BLOCK: config.block,
            Section.CODA: config.coda,
            Section.LOW: range(config.stack_size),
            Section.HIGH: range(config.stack_size, 2 * config.stack_size),
            Section.ENCODER: range(config.encoder.num_layers if config.encoder else 0),
        }
        return ranges.get(self, range(config.num_layers))


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk belongs: one of our parameters, or a part of a fused one.

    `shape` is its shape on disk, where that isn't the shape of the rows it fills. The section's layer i has
    the number `first` + `step` * i on disk.
    """

    parameter: str
    part: Part | None = None
    section: Section = Section.ALL
    shape: Callable[[LoopedConfig], tuple[int, ...]] | None = None
    first: int = 0
    step: int = 1

    def rows(self, config: LoopedConfig) -> slice:
        """The rows of the parameter that the tensor fills."""
        return self.part.rows(config) if self.part else slice(None)


# Name on disk -> place in our model, `{}` standing for the layer number in both. None: the tensor may
# be there and is dropped on purpose.
WeightTable = Mapping[str, Place | None]


@dataclass(frozen=True)
class TurnEnd:
    """A token that ends turns though no file says so; `document_end` is the one that the files name."""

    token_id: int
    text: str
    document_end: int


class Layout(NamedTuple):
    """How models of our own are saved: `holds` says which ones are saved so.

    `write_config` is the inverse of the family's `read_config`; it raises ValueError for a model that does
    not fit.
    """

    holds: Callable[[LoopedConfig], bool]
    write_config: Callable[[LoopedConfig], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    `read_config` turns the content of a config.json into a LoopedConfig or raises ConfigError. A
    checkpoint belongs to the family whose `architectures` (or, where config.json names none,
    `model_type`) it gives; of several such, to the one with `has` and without `lacks` in the names of
    its tensors.

    `turn_end` is the token that ends a turn of the family's chat models where every file of a checkpoint
    names only the end of a document. `layout` says which models of our own are saved as one of the family.
    `is_elastic`: its models are trained for many numbers of loops, so that a request may ask for more than
    config.json says.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], LoopedConfig]
    weights: WeightTable
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    turn_end: "TurnEnd | None" = None
    layout: "Layout | None" = None
    is_elastic: bool = False

    def fits(self, names: Collection[str]) -> bool:
        """Whether tensors with these names can be of this family."""

        def found(ending: str) -> bool:
            return any(name.endswith(ending) for name in names)

        return all(map(found, self.has)) and not any(map(found, self.lacks))

    def places(self, config: LoopedConfig) -> Iterator[tuple[str, Place | None]]:
        """The weight table with the layer numbers filled in."""
        for pattern, place in self.weights.items():
            section = place.section if place else Section.ALL
            first, step = (place.first, place.step) if place else (0, 1)
            for number, layer in enumerate(section.layers(config) if "{}" in pattern else [0]):
                filled = place and replace(place, parameter=place.parameter.format(layer))
                yield pattern.format(first + step * number), filled


class Fields:
    """Typed reading of a foreign config: a wrong type or a missing key is a ConfigError that names it.

    null counts as absent, as in transformers, except where a method says otherwise.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.raw = raw
        self.prefix = prefix

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number, at least 1; raises when it is absent and there is no default."""
        value = self._required(key, default)
        if type(value) is not int:
            raise self.wrong(key, "a whole number is wanted")
        if not 1 <= value < 2**31:
            raise self.wrong(key, "it must be at least 1 and fit 31 bits")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number, at least 0; raises when it is absent and there is no default."""
        return 0 if self.raw.get(key) == 0 and type(self.raw[key]) is int else self.integer(key, default)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`; raises when it is absent and there is no default."""
        value = self._required(key, default)
        if type(value) not in (int, float) or not -MAX_FLOAT <= value <= MAX_FLOAT:
            raise self.wrong(key, "a number is wanted")
        if value <= above:
            raise self.wrong(key, f"it must be greater than {above:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number greater than 0, or None when it is absent."""
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._required(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false is wanted")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string is wanted")
        return value

    def section(self, key: str) -> "Fields":
        """A nested object; empty when absent."""
        value: Any = self._required(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object is wanted")
        return Fields(value, f"{self.prefix}{key}.")

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers greater than 0; empty when absent."""
        return tuple(Fields({key: value}, self.prefix).number(key) for value in self.items(key))

    def items(self, key: str) -> list[Any]:
        """A list; empty when absent."""
        value: Any = self._required(key, [])
        if not isinstance(value, list):
            raise self.wrong(key, "a list is wanted")
        return value

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """A token id, or a list of them; null is no id, and only an absent key is the default."""
        value = self.raw.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise self.wrong(key, "a token id, a list of them or null is wanted")
        return tuple(ids)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.raw.get(key) is not None

    def refuse(self, *keys: str) -> None:
        """Raises when one of the keys is set to anything but null, false, zero or empty."""
        for key in keys:
            if self.raw.get(key):
                raise self.wrong(key, "this option is not supported")

    def wrong(self, key: str, why: str) -> ConfigError:
        """The error for a field: its name, its value and what is wrong with it."""
        return ConfigError(f"{self.prefix}{key} is {_shown(self.raw.get(key))}; {why}")

    def _required(self, key: str, default: T | None) -> T:
        value: T | None = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.prefix}{key} is missing from config.json")
        return value


def write_token_ids(ids: Sequence[int]) -> list[int] | int | None:
    """The ids as `Fields.token_ids` reads them: none as null, one by itself."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
