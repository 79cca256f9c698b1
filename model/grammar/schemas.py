"""JSON schemas as programs write them, in the words that llguidance knows.

Only changes that keep a schema's meaning: a `format` that nobody can check is an annotation, as JSON Schema
says; `uniqueItems: false` asks for nothing; names of properties from a fixed set, as Pydantic writes a
dictionary whose keys are an Enum, are said by a pattern. All else is left for llguidance to judge.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

KNOWN_FORMATS = frozenset(
    ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
)
# Where schemas stand within a schema; everything else, such as `const` and `default`, is data.
_ONE = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_MANY = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_ANNOTATIONS = frozenset(("$comment", "default", "description", "examples", "title"))
_REFERENCE = re.compile(r"#/(\$defs|definitions)/([^/~%]+)")

Schema = dict[str, Any]


# A space, or a line break with its indentation: models may lay JSON out, but not write blanks for ever.
JSON_BLANKS: dict[str, Any] = {"whitespace_pattern": r"( |\n[ \t]{0,20})"}


def embedded_schema(schema: object) -> str:
    """The schema as it stands behind `%json` in a grammar in Lark's notation, without annotations.

    Raises RecursionError where it is nested too deeply.
    """
    adapted = _Adapter(schema, drops_annotations=True).adapted(schema)
    whole = adapted if isinstance(adapted, dict) else {"allOf": [adapted]}
    return json.dumps(whole | {"x-guidance": JSON_BLANKS})


def adapt_schema(text: str) -> str:
    """The schema `text` (JSON) in llguidance's words; `text` itself where nothing is to change.

    Raises ValueError unless it is JSON, RecursionError where it is nested too deeply.
    """
    schema = json.loads(text)
    adapted = _Adapter(schema).adapted(schema)
    return text if adapted == schema else json.dumps(adapted)


class _Adapter:
    """Adapts one schema; `root` is where its references point into."""

    def __init__(self, root: object, *, drops_annotations: bool = False) -> None:
        self._root = root
        self._dropped = _ANNOTATIONS if drops_annotations else frozenset()

    def adapted(self, schema: Any) -> Any:  # noqa: ANN401 - JSON
        """The schema, or whatever stands in the place of one."""
        if not isinstance(schema, dict):
            return schema
        new = {
            key: value
            for key, value in schema.items()
            if key not in self._dropped and not _asks_for_nothing(key, value)
        }
        for key, value in new.items():
            if key in _NAMED and isinstance(value, dict):
                new[key] = {name: self.adapted(inner) for name, inner in value.items()}
            elif key in _MANY and isinstance(value, list):
                new[key] = [self.adapted(inner) for inner in value]
            elif key in _ONE:
                new[key] = self.adapted(value)
        return self._without_property_names(new)

    def _without_property_names(self, schema: Schema) -> Schema:
        """`propertyNames` as `patternProperties`, where the names are all that is said of properties."""
        if "propertyNames" not in schema or schema.keys() & {"properties", "patternProperties"}:
            return schema
        names = self._names(schema["propertyNames"])
        if names is None:
            return schema
        value = schema.get("additionalProperties", True)
        rest = {key: inner for key, inner in schema.items() if key != "propertyNames"}
        pattern = "^(" + "|".join(map(_escaped, names)) + ")$"
        return rest | {"patternProperties": {pattern: value}, "additionalProperties": False}

    def _names(self, schema: object) -> list[str] | None:
        """The texts that a schema allows, if they are a list."""
        if not isinstance(schema, Mapping):
            return None
        target = self._target(schema)
        values = target.get("enum", [target["const"]] if "const" in target else None)
        if not target.keys() <= {"enum", "const", "type", "title", "description", "default", "examples"}:
            return None
        if target.get("type", "string") != "string" or not isinstance(values, list) or not values:
            return None
        return values if all(isinstance(value, str) for value in values) else None

    def _target(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a schema refers to, if it does nothing else."""
        reference = schema.get("$ref")
        match = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
        if match is None or len(schema) > 1 or not isinstance(self._root, Mapping):
            return schema
        place = self._root.get(match[1])
        target = place.get(match[2]) if isinstance(place, Mapping) else None
        return target if isinstance(target, Mapping) else schema


def _asks_for_nothing(key: str, value: object) -> bool:
    if key == "format":
        return isinstance(value, str) and value not in KNOWN_FORMATS
    return key == "uniqueItems" and value is False


def _escaped(name: str) -> str:
    """A regular expression for one name, in which only ASCII punctuation has a meaning."""
    return re.sub(r"[\\^$.|?*+()\[\]{}/-]", r"\\\g<0>", name)
