"""The fields that every kind of generation shares, with their limits.

Limits that depend on the model are checked in `server.planning`.
"""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from model.protocol import Grammar
from server.errors import InvalidRequestError
from server.schemas.base import INT64_MAX, NonEmpty, RequestModel, Text, TokenId
from server.schemas.structured import ResponseFormat, StructuredOutputs

MAX_LOGPROBS = 20
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(RequestModel):
    """What a stream carries besides text."""

    unserved: ClassVar[dict[str, tuple[object, ...]]] = {"include_obfuscation": (None, False)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(RequestModel):
    """How tokens are chosen, and what ends a generation."""

    model: str
    n: int = Field(1, ge=1, le=128)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] = Field(default=[])
    stop_token_ids: list[TokenId] = Field(default=[])
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
    logit_bias: dict[str, Bias] = Field(default={})
    seed: int | None = Field(
        None, ge=-(2**63), le=INT64_MAX, description="choice i uses seed + i, wrapped to 64 bits"
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=INT64_MAX, description="keep so many tokens of the prompt's end; -1: what fits"
    )
    priority: int = Field(0, ge=-(2**63), le=INT64_MAX, description="smaller is served first")
    cache_salt: NonEmpty | None = Field(
        None, description="prefixes are shared only with requests of the same salt"
    )
    return_token_ids: bool = False
    skip_special_tokens: bool = True
    speculation: bool = Field(True, description="false: the same text, one loop after the other")
    num_loops: int | None = Field(None, ge=1, description="run at a smaller depth than the model's own")
    init_scale: float = Field(
        0.0,
        ge=0,
        le=10,
        description="recurrent-depth models: scale of the noise that the state starts from (by the seed)",
    )
    draft_policy: NonEmpty | None = Field(None, description="one of the engine's; the text is the same")

    @model_validator(mode="after")
    def _check_shared_combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed with stream: true", param="stream_options"
            )
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise InvalidRequestError(
                "structured_outputs and response_format both ask for a format", param="structured_outputs"
            )
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens is 0, but the model needs at least one token",
                param="truncate_prompt_tokens",
            )
        return self

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def grammar(self) -> Grammar | None:
        """What the text must match, whichever field says it."""
        if self.structured_outputs is not None:
            return self.structured_outputs.to_grammar()
        return self.response_format.to_grammar() if self.response_format is not None else None

    @property
    def token_limit(self) -> int | None:
        """How many tokens may be generated; None: until the context is full."""
        raise NotImplementedError

    @property
    def num_candidates(self) -> int:
        """How many completions of a prompt are generated, of which `n` are returned."""
        return self.n

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are reported beside each one; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False
