"""Bodies of /v1/completions."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from server.errors import InvalidRequestError
from server.limits import MAX_IDS, MAX_PROMPTS
from server.schemas.base import Text, TokenId, each_of
from server.schemas.loop_scores import LoopToken
from server.schemas.prompt_scores import PromptScores
from server.schemas.sampling import MAX_LOGPROBS, NO_LIMIT, SamplingFields, agreed_limit
from server.schemas.usage import Usage
from server.schemas.wave import Wave

DEFAULT_MAX_TOKENS = 16


def _kind_of_prompt(value: object) -> str | None:
    """Which of the four a prompt is meant to be, by its first entry."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


Ids = Annotated[list[TokenId], each_of(MAX_IDS)]
Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], each_of(MAX_PROMPTS), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], each_of(MAX_PROMPTS), Tag("lists")],
    # Not tried one after the other: that took four times as long, and ended in a complaint for each.
    Discriminator(
        _kind_of_prompt,
        custom_error_type="request.prompt",
        custom_error_message="must be a string, a list of strings, of token ids or of lists of token ids",
    ),
]


DecoderPrompt = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Ids, Tag("ids")],
    Discriminator(
        lambda value: "text" if isinstance(value, str) else "ids" if isinstance(value, list) else None,
        custom_error_type="request.decoder_prompt",
        custom_error_message="must be a string or a list of token ids",
    ),
]


class CompletionRequest(SamplingFields):
    """A request as far as it can be judged without a model."""

    has_many_prompts: ClassVar[bool] = True

    prompt: Prompt
    max_tokens: int | None = Field(
        None, ge=NO_LIMIT, description="default: 16, or what fits; null or -1: until the context is full"
    )
    max_completion_tokens: int | None = Field(None, ge=NO_LIMIT, description="another name of max_tokens")
    best_of: int | None = Field(None, ge=1, le=128, description="by mean log-probability of the tokens")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Text | None = Field(None, description="text behind the completion; empty: none")
    decoder_prompt: DecoderPrompt | None = Field(
        None,
        description="encoder-decoder models: what the completion goes on from, behind the start token",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({limit})", param="min_tokens"
            )
        if self.num_candidates < self.n:
            raise InvalidRequestError(f"best_of ({self.best_of}) is less than n ({self.n})", param="best_of")
        if self.stream and self.num_candidates > self.n:
            raise InvalidRequestError(
                f"best_of ({self.best_of}) greater than n ({self.n}) cannot be streamed: which completions "
                "are the best is known at their ends",
                param="best_of",
            )
        if self.echo and self.suffix:
            raise InvalidRequestError("echo is not allowed with suffix", param="echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list; each is text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [part for part in self.prompt if isinstance(part, int)]
        return [token_ids] if token_ids else [part for part in self.prompt if not isinstance(part, int)]

    @model_validator(mode="before")
    @classmethod
    def _take_null_as_no_limit(cls, data: object) -> object:
        """Takes null for no limit, as vLLM does; for other fields null is the same as absent."""
        if isinstance(data, dict) and data.get("max_tokens", 0) is None:
            return data | {"max_tokens": NO_LIMIT if data.get("max_completion_tokens") is None else None}
        return data

    @property
    def token_limit(self) -> int | None:
        """The default is OpenAI's."""
        limit = agreed_limit(self.max_tokens, self.max_completion_tokens)
        if limit is None:
            return DEFAULT_MAX_TOKENS
        return None if limit == NO_LIMIT else limit

    @property
    def may_be_cut(self) -> bool:
        """Unless the client gave a number."""
        given = self.max_tokens is not None or self.max_completion_tokens is not None
        return not given or self.token_limit is None

    @property
    def num_candidates(self) -> int:
        """`best_of`, as many as `n` by default."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are reported beside each one, as `logprobs` says."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """If asked."""
        return self.echo


class CompletionLogprobs(BaseModel):
    """Four lists of equal length. `text_offset` counts characters of the choice's text, echo included."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or what a chunk of a stream adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptScores | None = None
    loop_logprobs: list[LoopToken] | None = None
    wave: Wave | None = None


class CompletionResponse(BaseModel):
    """An answer, or a chunk of a stream. Fields that were not set are left out of the JSON."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    lossy: list[str] | None = Field(None, description="fields by which the text may not be the model's own")
    usage: Usage | None = None
