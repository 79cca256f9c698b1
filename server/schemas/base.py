"""What all request bodies have in common: strict types, and the rule for fields that aren't served.

Invariant: no field is dropped in silence. One that is unknown stays in `model_extra`, where
`reject_extra_fields` finds it.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, ClassVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from server.errors import UnknownFieldError, UnsupportedFieldError, quote
from server.limits import MAX_NAME

INT64_MAX = 2**63 - 1


Text = str  # of any length that a body may have
Name = Annotated[str, Field(max_length=MAX_NAME)]
NonEmpty = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]


def complain(text: str) -> PydanticCustomError:
    """An error for validators to raise; `text` follows the place of the value, and the client reads it."""
    # As an argument: braces in `text` are no fields to fill in.
    return PydanticCustomError("request.complaint", "{text}", {"text": text})


def type_of(value: object, default: str = "") -> str:
    """The `type` of an object, as it came or validated; `default` where it has none."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind is None:
        return default
    return kind if isinstance(kind, str) else ""


def check_type(value: object, served: Sequence[str]) -> object:
    """Complains about an object whose `type` isn't served. A missing one is let through."""
    if not isinstance(value, dict | BaseModel):
        raise complain(f"must be an object, not {quote(value)}")
    if type_of(value, served[0]) not in served:
        kind = value.get("type") if isinstance(value, dict) else None
        raise complain(f"has the type {quote(kind)}, which is not supported: {_listed(served)}")
    return value


def _listed(served: Sequence[str]) -> str:
    return f"{', '.join(served)} {'is' if len(served) == 1 else 'are'}"


def at_most(most: int) -> BeforeValidator:
    """Counts the entries of an object before any of them is looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise complain(f"must have at most {most} entries, not {len(value)}")
        return value

    return BeforeValidator(check)


def each_of(most: int, least: int = 0) -> FieldInfo:
    """Limits of a list; the first bad entry ends validation."""
    limits: FieldInfo = Field(min_length=least, max_length=most, fail_fast=True)
    return limits


def _allow_null(schema: JsonSchemaValue) -> None:
    if "$ref" in schema:
        schema["anyOf"] = [{"$ref": schema.pop("$ref")}]
    if "oneOf" in schema:
        schema["anyOf"] = [{"oneOf": schema.pop("oneOf")}]
    if "anyOf" not in schema:
        schema["type"] = [schema["type"], "null"]
    elif {"type": "null"} not in schema["anyOf"]:
        schema["anyOf"].append({"type": "null"})


def _types_in(annotation: object) -> Iterator[object]:
    """The types that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


@cache
def _integer_fields(model: type[BaseModel]) -> frozenset[str]:
    """The fields whose numbers are all integers."""
    types = {name: list(_types_in(field.annotation)) for name, field in model.model_fields.items()}
    return frozenset(name for name, found in types.items() if int in found and float not in found)


def _whole_numbers(value: object, levels: int = 2) -> object:
    """The value with 16.0 as 16, within lists of lists too; all else is left for the type to judge."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if levels and isinstance(value, list) and any(isinstance(part, float | list) for part in value):
        return [_whole_numbers(part, levels - 1) for part in value]
    return value


class RequestModel(BaseModel):
    """Strict types, finite numbers; null is the same as absent, as in OpenAI's schema.

    16.0 is an integer, as in JSON Schema, which the OpenAPI document speaks; 16.5, "16" and true are none.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    has_many_prompts: ClassVar[bool] = False  # else at most one

    # Fields of the API that are not served, with the values that ask for nothing.
    unserved: ClassVar[dict[str, tuple[object, ...]]] = {}
    # What to send in place of some of these.
    hints: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        aliases = {field.alias for field in cls.model_fields.values()}
        return {
            name: value
            for name, value in data.items()
            if value is not None or not (name in cls.model_fields or name in aliases)
        }

    @field_validator("*", mode="before")
    @classmethod
    def _take_whole_numbers(cls, value: object, info: ValidationInfo) -> object:
        return _whole_numbers(value) if info.field_name in _integer_fields(cls) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Says of every field that may be absent that it may be null."""
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", []):
                _allow_null(field)
        return schema

    def parts(self) -> Iterator[tuple[str, "RequestModel"]]:
        """The bodies within this one, each with its place."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, RequestModel):
                yield field.alias or name, value
            elif isinstance(value, list):
                for index, part in enumerate(value):
                    if isinstance(part, RequestModel):
                        yield f"{field.alias or name}.{index}", part

    def reject_extra_fields(self, *, allow_unknown: bool, place: str = "") -> None:
        """Raises for a field that isn't served, here or in a part; `place` is where this body stands.

        One of OpenAI's is let through if it asks for nothing, an unknown one if `allow_unknown`.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in self.unserved:
                if not allow_unknown:
                    raise UnknownFieldError(name, place)
            elif not self._is_neutral(name, value):
                raise UnsupportedFieldError(name, place, self.hints.get(name, ""))
        for inner, part in self.parts():
            part.reject_extra_fields(allow_unknown=allow_unknown, place=f"{place}{inner}.")

    def _is_neutral(self, name: str, value: object) -> bool:
        """Whether the value of an unserved field changes nothing."""
        # The types too, lest 0 pass for False.
        return any(type(value) is type(neutral) and value == neutral for neutral in self.unserved[name])
