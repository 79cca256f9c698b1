"""What all request bodies have in common: strict types, and the rule for fields that aren't served.

Invariant: no field is dropped in silence. One that is unknown stays in `model_extra`, where
`reject_extra_fields` finds it.
"""

from collections.abc import Iterator
from functools import cache
from typing import Annotated, ClassVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.errors import UnknownFieldError, UnsupportedFieldError

INT64_MAX = 2**63 - 1


def _check_unicode(text: str) -> str:
    text.encode()  # UnicodeEncodeError is a ValueError
    return text


# JSON can carry lone surrogates, and pydantic lets them through in a union.
Text = Annotated[str, AfterValidator(_check_unicode)]
NonEmpty = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]


def _allow_null(schema: JsonSchemaValue) -> None:
    if "$ref" in schema:
        schema["anyOf"] = [{"$ref": schema.pop("$ref")}]
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

    # Fields of the API that are not served, with the values that ask for nothing.
    unserved: ClassVar[dict[str, tuple[object, ...]]] = {}

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

    def parts(self) -> Iterator["RequestModel"]:
        """The bodies within this one."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, RequestModel):
                    yield part

    def reject_extra_fields(self, *, allow_unknown: bool) -> None:
        """Raises for a field that isn't served, here or in a part.

        One of OpenAI's is let through if it asks for nothing, an unknown one if `allow_unknown`.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in self.unserved:
                if not allow_unknown:
                    raise UnknownFieldError(name)
            elif not self._is_neutral(name, value):
                raise UnsupportedFieldError(name)
        for part in self.parts():
            part.reject_extra_fields(allow_unknown=allow_unknown)

    def _is_neutral(self, name: str, value: object) -> bool:
        """Whether the value of an unserved field changes nothing."""
        # The types too, lest 0 pass for False.
        return any(type(value) is type(neutral) and value == neutral for neutral in self.unserved[name])
