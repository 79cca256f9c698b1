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
from server.schemas.sampling import SamplingFields, StreamOptions, Text, TokenId


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
    echo: bool = False

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed with stream: true", param="stream_options"
            )
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list; each is text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [part for part in self.prompt if isinstance(part, int)]
        return [token_ids] if token_ids else [part for part in self.prompt if not isinstance(part, int)]

    def is_neutral(self, name: str, value: object) -> bool:
        """`best_of` equal to `n` ranks nothing."""
        best_of_all = name == "best_of" and type(value) is int and value == self.n
        return best_of_all or super().is_neutral(name, value)

    def reject_extra_fields(self, *, allow_unknown: bool) -> None:
        """Also those of `stream_options`."""
        super().reject_extra_fields(allow_unknown=allow_unknown)
        (self.stream_options or StreamOptions()).reject_extra_fields(allow_unknown=allow_unknown)


class PromptTokensDetails(BaseModel):
    """How much of the prompts was found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Drafted tokens that the full depth confirmed and contradicted."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """What a request cost, all its choices together; a prompt counts once, however large `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionChoice(BaseModel):
    """One completion, or what a chunk of a stream adds to it."""

    index: int
    text: str
    logprobs: None = None
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
