"""The fields that every kind of generation shares, with their limits.

Limits that depend on the model are checked in `server.planning`.
"""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from model.protocol import Grammar
from server.errors import InvalidRequestError
from server.limits import MAX_LOGIT_BIAS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from server.schemas.base import INT64_MAX, Name, NonEmpty, RequestModel, TokenId, at_most, each_of
from server.schemas.structured import Choices, GrammarText, JsonSchema, ResponseFormat, StructuredOutputs

MAX_LOGPROBS = 20
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(RequestModel):
    """What a stream carries besides text."""

    unserved: ClassVar[dict[str, tuple[object, ...]]] = {"include_obfuscation": (None, False)}

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_wave: bool = Field(False, description="ours: what each pass did for this request")


NO_LIMIT = -1  # of max_tokens, as vLLM and llama.cpp understand it


def agreed_limit(first: int | None, second: int | None) -> int | None:
    """What `max_tokens` and its other name `max_completion_tokens` say; None: neither was given.

    Raises InvalidRequestError if they differ.
    """
    if None not in (first, second) and first != second:
        raise InvalidRequestError(
            f"max_tokens ({first}) and max_completion_tokens ({second}) mean the same, but differ",
            param="max_tokens",
        )
    return second if first is None else first


class TokenFields(RequestModel):
    """How tokens are chosen and what ends a generation, under names that all our routes share."""

    stop_token_ids: Annotated[list[TokenId], each_of(MAX_STOP_TOKEN_IDS)] = Field(default=[])
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1, description="0: always the likeliest token")
    top_k: int = Field(0, ge=-1, le=INT64_MAX, description="0 or -1: off")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: Annotated[dict[str, Bias], at_most(MAX_LOGIT_BIAS)] = Field(
        default={}, max_length=MAX_LOGIT_BIAS
    )
    seed: int | None = Field(
        None, ge=-(2**63), le=INT64_MAX, description="choice i uses seed + i, wrapped to 64 bits"
    )
    priority: int = Field(
        0,
        ge=-(2**63),
        le=INT64_MAX,
        description="smaller is served first; other than 0 only where the server allows it",
    )
    cache_salt: NonEmpty | None = Field(
        None, description="prefixes are shared only with requests of the same salt"
    )
    skip_special_tokens: bool = True
    speculation: bool = Field(True, description="false: the same text, one loop after the other")
    num_loops: int | None = Field(None, ge=1, description="run at another depth than the model's own")
    init_scale: float = Field(
        0.0,
        ge=0,
        le=10,
        description="recurrent-depth models: scale of the noise that the state starts from (by the seed)",
    )
    draft_policy: NonEmpty | None = Field(None, description="one of the engine's; the text is the same")


class SamplingFields(TokenFields):
    """What a request for completions asks of each of them, in whatever way it gives its prompt."""

    model: str
    n: int = Field(1, ge=1, le=128)
    stop: NonEmpty | Annotated[list[NonEmpty], each_of(MAX_STOP_STRINGS)] = Field(default=[])
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | GrammarText | None = Field(None, description="structured_outputs.json")
    guided_regex: GrammarText | None = Field(None, description="structured_outputs.regex")
    guided_choice: Choices | None = Field(None, description="structured_outputs.choice")
    guided_grammar: GrammarText | None = Field(None, description="structured_outputs.grammar")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=INT64_MAX, description="keep so many tokens of the prompt's end; -1: what fits"
    )
    return_token_ids: bool = False
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="likeliest tokens beside each of the prompt's; not streamed"
    )

    loop_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="ours: what every loop says of each token of the answer, with so many of its likeliest",
    )
    exit_threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="ours, lossy, for models with an exit gate: a token is that of the first loop at which "
        "the gate has stopped with this probability",
    )

    @model_validator(mode="after")
    def _check_shared_combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed with stream: true", param="stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError(
                "prompt_logprobs is not allowed with stream: true", param="prompt_logprobs"
            )
        if len(formats := self._formats()) > 1:
            first, second, *_ = formats
            raise InvalidRequestError(f"{first} and {second} both ask for a format", param=first)
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
    def lossy_fields(self) -> list[str]:
        """Fields by which the text may be another one than that of the model's own depth."""
        return [] if self.exit_threshold is None else ["exit_threshold"]

    def _formats(self) -> dict[str, ResponseFormat | StructuredOutputs]:
        """By field, everything that asks for a format. Those called guided are vLLM's older names."""
        found: dict[str, ResponseFormat | StructuredOutputs] = {}
        if self.structured_outputs is not None:
            found["structured_outputs"] = self.structured_outputs
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, name := f"guided_{kind}")) is not None:
                found[name] = StructuredOutputs.model_validate({kind: value})
        if self.response_format is not None and self.response_format.type != "text":
            found["response_format"] = self.response_format
        return found

    @property
    def includes_wave(self) -> bool:
        """Whether the stream tells what each pass did."""
        return self.stream_options is not None and self.stream_options.include_wave

    @property
    def format_field(self) -> str | None:
        """The field that asks for a format, if one does."""
        return next(iter(self._formats()), None)

    @property
    def grammar(self) -> Grammar | None:
        """What the text must match, whichever field says it."""
        return next((wanted.to_grammar() for wanted in self._formats().values()), None)

    @property
    def token_limit(self) -> int | None:
        """How many tokens may be generated; None: until the context is full."""
        raise NotImplementedError

    @property
    def may_be_cut(self) -> bool:
        """Whether `token_limit` is a default, which yields to what the context has room for."""
        return self.token_limit is None

    @property
    def num_candidates(self) -> int:
        """How many completions of a prompt are generated, of which `n` are returned."""
        return self.n

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are reported beside each one; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many likeliest tokens are reported beside each of the prompt's; None: they are not scored."""
        asked = [self.prompt_logprobs, self.num_logprobs if self.echoes else None]
        return max((number for number in asked if number is not None), default=None)

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False
