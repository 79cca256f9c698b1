"""The fields that every kind of generation shares, with their limits, and the rule for all other fields.

Invariant: no field is dropped in silence. One that is unknown stays in `model_extra`, where
`reject_extra_fields` finds it. Limits that depend on the model are checked in `server.planning`.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from server.errors import UnknownFieldError, UnsupportedFieldError

INT64_MAX = 2**63 - 1


def _check_unicode(text: str) -> str:
    text.encode()  # UnicodeEncodeError is a ValueError
    return text


# JSON can carry lone surrogates, and pydantic lets them through in a union.
Text = Annotated[str, AfterValidator(_check_unicode)]
NonEmpty = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]
Bias = Annotated[float, Field(ge=-100, le=100)]

# Fields of the API that are not served, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "logprobs": (None,),
    "best_of": (None,),
    "suffix": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "cache_salt": (None,),
    "truncate_prompt_tokens": (None,),
    "include_obfuscation": (None, False),
}


class RequestModel(BaseModel):
    """Strict types, finite numbers; null is the same as absent, as in OpenAI's schema."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {
            name: value for name, value in data.items() if value is not None or name not in cls.model_fields
        }

    def reject_extra_fields(self, *, allow_unknown: bool) -> None:
        """Raises for a field that isn't served; one of the API's is only ignored if it asks for nothing."""
        for name, value in (self.model_extra or {}).items():
            if name not in UNSUPPORTED:
                if not allow_unknown:
                    raise UnknownFieldError(name)
            elif not self.is_neutral(name, value):
                raise UnsupportedFieldError(name)

    def is_neutral(self, name: str, value: object) -> bool:
        """Whether the value of an unsupported field changes nothing."""
        # The types too, lest 0 pass for False.
        return any(type(value) is type(neutral) and value == neutral for neutral in UNSUPPORTED[name])


class StreamOptions(RequestModel):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(RequestModel):
    """How tokens are chosen, and what ends a generation."""

    model: str
    n: int = Field(1, ge=1, le=128)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] = Field(default=[])
    stop_token_ids: list[TokenId] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=INT64_MAX, description="0 or -1: off")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[str, Bias] = {}
    seed: int | None = Field(
        None, ge=-(2**63), le=INT64_MAX, description="choice i uses seed + i, wrapped to 64 bits"
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    priority: int = Field(0, ge=-(2**63), le=INT64_MAX, description="smaller is served first")
    return_token_ids: bool = False
    skip_special_tokens: bool = True
    speculation: bool = Field(True, description="false: the same text, one loop after the other")
    num_loops: int | None = Field(None, ge=1, description="run at a smaller depth than the model's own")

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop
