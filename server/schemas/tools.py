"""Tools of a request, and which of them must be called: OpenAI's shapes.

Whether a schema can be followed is `model.grammar.check`'s to say.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from server.errors import InvalidRequestError, quote
from server.limits import MAX_TOOL_NAME, MAX_TOOLS
from server.schemas.base import Name, RequestModel, Text, complain, each_of

NAME_PATTERN = rf"^[a-zA-Z0-9_.-]{{1,{MAX_TOOL_NAME}}}$"
ToolName = Annotated[str, Field(pattern=NAME_PATTERN)]
# Words of a schema that would contradict, or be contradicted by, a word that forbids all other properties.
_COMPOSED = frozenset(("$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "propertyNames"))


class FunctionDefinition(RequestModel):
    """A function that the model may call."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of an object; default: none")
    strict: bool = Field(False, description="true: a grammar sees to it that calls match the schema")

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        """What parsers rely on."""
        for word, kind, name in (("properties", dict, "an object"), ("required", list, "a list of strings")):
            value = (schema or {}).get(word, kind())
            if not isinstance(value, kind) or not (kind is dict or all(isinstance(x, str) for x in value)):
                raise complain(f"has {word} that are not {name}: {quote(value)}")
        if (schema or {}).get("type", "object") != "object":
            raise complain(f"must be of the type 'object', not {quote((schema or {})['type'])}")
        return schema

    @property
    def num_characters(self) -> int:
        """Characters of what the model is told of the function, roughly."""
        return len(self.name) + len(self.description or "") + len(_dump(self.parameters))

    @property
    def json_schema(self) -> str:
        """The schema of all arguments as JSON."""
        return _dump(self.object_schema)

    @property
    def object_schema(self) -> dict[str, Any]:
        """The parameters as a schema that allows objects alone, and of those none with unknown properties."""
        schema = {"type": "object", **(self.parameters or {})}
        if schema.keys() & _COMPOSED:
            return schema
        return {"properties": {}, "additionalProperties": False} | schema


class Tool(RequestModel):
    """A tool of the only type that there is here."""

    type: Literal["function"]
    function: FunctionDefinition

    @field_validator("type", mode="before")
    @classmethod
    def _check_type(cls, kind: object) -> object:
        if isinstance(kind, str) and kind != "function":
            raise complain(f"is {quote(kind)}, which is not supported: only 'function' is")
        return kind


Tools = Annotated[list[Tool], each_of(MAX_TOOLS)]


class FunctionName(RequestModel):
    """A function by its name."""

    name: ToolName


class NamedTool(RequestModel):
    """One of the tools."""

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedTools(RequestModel):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], each_of(MAX_TOOLS, least=1)]


class ToolChoiceObject(RequestModel):
    """One tool that must be called, or those that may be."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        other = "allowed_tools" if self.type == "function" else "function"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise complain(f"has the type {self.type!r}, which goes with the field {self.type} alone")
        return self


def _kind_of_choice(value: object) -> str:
    return "object" if isinstance(value, dict | ToolChoiceObject) else "word"


# By its kind, so that an object is complained of as one.
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[ToolChoiceObject, Tag("object")],
    Discriminator(_kind_of_choice),
]


class CalledFunction(RequestModel):
    """What a call asked for."""

    name: ToolName
    arguments: Text | dict[str, Any] = Field("", description="the text of a JSON object; empty: no arguments")


class ToolCallMessage(RequestModel):
    """A call that the model made, as it was sent out."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="taken and not needed")


def _dump(schema: dict[str, Any] | None) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequestError("tools: a schema is nested too deeply", param="tools") from None
