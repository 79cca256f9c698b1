"""What a generated text must look like: `response_format`, and `structured_outputs` as in vLLM.

Knows nothing about grammars: whether a schema or expression can be used is `model.grammar.check`'s to say.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from model.protocol import Grammar
from server.errors import InvalidRequestError
from server.limits import MAX_CHOICES, MAX_GRAMMAR
from server.schemas.base import NonEmpty, RequestModel, Text, each_of

JsonSchema = dict[str, Any]
Choices = Annotated[list[NonEmpty], each_of(MAX_CHOICES, least=1)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]


class NamedSchema(RequestModel):
    """A JSON schema as OpenAI wraps it. `strict` or not, the answer follows it."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    json_schema: JsonSchema = Field(default={}, alias="schema")
    strict: bool = False


class ResponseFormat(RequestModel):
    """Any text, any JSON object, or JSON after a schema.

    The schema stands in `json_schema`, as OpenAI has it, or in `schema`, as many others do.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    bare_schema: JsonSchema | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        problem = None
        if self.type == "text" and self.bare_schema is not None:
            problem = "schema is only allowed with type json_object or json_schema"
        elif self.type != "json_schema" and self.json_schema is not None:
            problem = "json_schema is only allowed with type json_schema"
        elif self.type == "json_schema" and (self.json_schema is None) == (self.bare_schema is None):
            problem = "json_schema is required with type json_schema, and goes without schema"
        if problem is not None:
            raise InvalidRequestError(f"response_format.{problem}", param="response_format")
        return self

    def to_grammar(self) -> Grammar | None:
        """The format as a grammar of the engine; None if any text will do."""
        schema = self.bare_schema if self.json_schema is None else self.json_schema.json_schema
        if schema is not None:
            return Grammar(kind="json_schema", text=_dump("response_format", schema))
        return Grammar(kind="json_object") if self.type == "json_object" else None


class StructuredOutputs(RequestModel):
    """Exactly one of: a JSON schema (or its text), a regular expression, choices, a grammar after Lark."""

    json_schema: JsonSchema | GrammarText | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        given = [self.json_schema, self.regex, self.choice, self.grammar]
        if sum(part is not None for part in given) != 1:
            raise InvalidRequestError(
                "structured_outputs needs exactly one of json, regex, choice and grammar",
                param="structured_outputs",
            )
        return self

    def to_grammar(self) -> Grammar:
        """The wanted structure as a grammar of the engine."""
        if self.regex is not None:
            return Grammar(kind="regex", text=self.regex)
        if self.choice is not None:
            return Grammar(kind="choice", text=_dump("structured_outputs", self.choice))
        if self.grammar is not None:
            return Grammar(kind="lark", text=self.grammar)
        if isinstance(self.json_schema, str):
            return Grammar(kind="json_schema", text=self.json_schema)
        return Grammar(kind="json_schema", text=_dump("structured_outputs", self.json_schema))


def _dump(param: str, value: object) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise InvalidRequestError(f"{param} is nested too deeply", param=param) from None
