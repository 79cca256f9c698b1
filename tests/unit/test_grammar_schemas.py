"""Schemas in llguidance's words mean what they meant."""

import json
import re
from collections.abc import Callable, Sequence

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.grammar.check import GrammarError, check_grammar
from model.grammar.schemas import KNOWN_FORMATS, adapt_schema
from model.protocol import Grammar
from tests.loose import Json


def adapted(schema: object) -> object:
    return json.loads(adapt_schema(json.dumps(schema)))


def compiles(schema: object) -> None:
    check_grammar(Grammar(kind="json_schema", text=json.dumps(schema)))


@pytest.mark.parametrize("name", sorted(KNOWN_FORMATS))
def test_known_formats_are_kept_and_compile(name: str) -> None:
    schema = {"type": "string", "format": name}
    assert adapted(schema) == schema
    compiles(schema)


@pytest.mark.parametrize(
    "name", ["password", "path", "file-path", "binary", "regex", "int32", "uri-reference"]
)
def test_other_formats_are_annotations_wherever_they_stand(name: str) -> None:
    leaf = {"type": "string", "format": name}
    bare = {"type": "string"}
    places: list[Callable[[Json], Json]] = [
        lambda part: part,
        lambda part: {"properties": {"format": part}},
        lambda part: {"type": "array", "items": part},
        lambda part: {"anyOf": [{"type": "null"}, part]},
        lambda part: {"$defs": {"A": part}, "$ref": "#/$defs/A"},
        lambda part: {"type": "object", "additionalProperties": part},
    ]
    for place in places:
        assert adapted(place(leaf)) == place(bare)
    compiles({"type": "object", "properties": {"format": leaf}})


@pytest.mark.parametrize(
    "schema",
    [
        {"const": {"format": "x", "uniqueItems": False}},
        {"enum": [{"format": "x"}], "default": {"format": "y"}},
        {"properties": {"format": {"type": "string"}, "propertyNames": {"type": "null"}}},
        {"uniqueItems": True},
        {"propertyNames": {"pattern": "^a"}},
        {"propertyNames": {"enum": ["a", 1]}},
        {"propertyNames": {"enum": []}},
        {"propertyNames": {"$ref": "#/$defs/Missing"}},
        {"propertyNames": {"enum": ["a"]}, "properties": {"b": {}}},
        True,
        [],
        "text",
    ],
    ids=str,
)
def test_what_must_not_change_does_not(schema: Sequence[object] | bool | dict[str, Json] | str) -> None:
    assert adapt_schema(json.dumps(schema)) == json.dumps(schema)


def test_asking_for_no_uniqueness_is_asking_for_nothing() -> None:
    assert adapted({"type": "array", "uniqueItems": False}) == {"type": "array"}


@settings(deadline=None, max_examples=100)
@given(
    names=st.lists(st.text("ab.$^|()[]{}\\/-é 世", min_size=1, max_size=4), min_size=1, max_size=3),
    keys=st.lists(st.text("ab.$^|()[]{}\\/-é 世", max_size=4), max_size=2),
    by_reference=st.booleans(),
)
def test_names_of_a_set_are_a_pattern_of_the_same_names(
    names: list[str], keys: list[str], by_reference: bool
) -> None:
    enum = {"enum": names, "type": "string", "title": "Names"}
    schema = {
        "type": "object",
        "additionalProperties": {"type": "integer"},
        "propertyNames": {"$ref": "#/$defs/Names"} if by_reference else enum,
        "$defs": {"Names": enum},
    }
    new: Json = adapted(schema)
    assert "propertyNames" not in new
    (pattern,) = new["patternProperties"]
    for name in [*names, *keys]:
        assert (re.search(pattern, name) is not None) == (name in names)
        assert jsonschema_rs.is_valid(schema, {name: 1}) == (name in names)


def test_names_of_a_set_compile() -> None:
    compiles({"type": "object", "propertyNames": {"enum": ["a.b", "dark (2)", "é/-"]}})


@pytest.mark.parametrize("keyword", ["uniqueItems", "not", "contains", "propertyNames"])
def test_what_nobody_can_follow_is_named(keyword: str) -> None:
    value = {"uniqueItems": True}.get(keyword, {"pattern": "^a"})
    with pytest.raises(GrammarError, match=f"not supported: {keyword}"):
        compiles({keyword: value})


def test_depth_is_no_crash() -> None:
    schema = '{"items":' * 5000 + "{}" + "}" * 5000
    with pytest.raises(GrammarError, match="nested too deeply"):
        check_grammar(Grammar(kind="json_schema", text=schema))
