"""Bodies of /v1/completions."""

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.schemas.base import Text, TokenId
from server.schemas.sampling import MAX_LOGPROBS, SamplingFields
from server.schemas.usage import Usage


def _one_message(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """One sentence instead of pydantic's complaint for each member of the union."""
    try:
        validated: object = handler(value)
    except ValidationError:
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists"
        ) from None
    return validated


Prompt = Annotated[Text | list[Text] | list[TokenId] | list[list[TokenId]], WrapValidator(_one_message)]


class CompletionRequest(SamplingFields):
    """A request as far as it can be judged without a model."""

    prompt: Prompt
    max_tokens: int = Field(16, ge=0)
    best_of: int | None = Field(None, ge=1, le=128, description="by mean log-probability of the tokens")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Text | None = Field(None, description="text behind the completion; empty: none")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})",
                param="min_tokens",
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

    @property
    def token_limit(self) -> int:
        """The default is OpenAI's: 16."""
        return self.max_tokens

    @property
    def num_candidates(self) -> int:
        """`best_of`, as many as `n` by default."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_logprobs(self) -> int | None:
        """As many as `logprobs` says."""
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


class CompletionResponse(BaseModel):
    """An answer, or a chunk of a stream. Fields that were not set are left out of the JSON."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
