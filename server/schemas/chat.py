"""Bodies of /v1/chat/completions."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, StringConstraints, field_validator, model_validator

from server.errors import InvalidRequestError, quote
from server.schemas.base import RequestModel, Text
from server.schemas.sampling import MAX_LOGPROBS, SamplingFields
from server.schemas.usage import Usage

OTHER_ROLES = ("tool", "function")  # OpenAI's, but nothing without tools


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, data: object) -> object:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise InvalidRequestError(
                f"messages: content of type {quote(kind)} is not supported, only text is", param="messages"
            )
        return data


class Message(RequestModel):
    """A turn of the conversation."""

    # An assistant's message comes back as it was sent out, empty fields included.
    unserved: ClassVar[dict[str, tuple[object, ...]]] = {
        "refusal": (None,),
        "tool_calls": (None, []),
        "function_call": (None,),
        "audio": (None,),
        "annotations": (None, []),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _check_role(cls, role: object) -> object:
        if role in OTHER_ROLES:
            raise InvalidRequestError(
                f"messages: the role {role!r} is not supported: this server has no tools", param="messages"
            )
        return role

    @property
    def text(self) -> str:
        """The content; parts stand on lines of their own, as in vLLM."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, str]:
        """What a chat template sees."""
        seen = {"role": self.role, "content": self.text}
        return seen if self.name is None else {**seen, "name": self.name}


Messages = Annotated[list[Message], Field(min_length=1)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


class TemplateFields(RequestModel):
    """How messages become a prompt."""

    add_generation_prompt: bool = Field(True, description="end with what begins the assistant's turn")
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="further variables of the template")


class ChatRequest(SamplingFields, TemplateFields):
    """A request as far as it can be judged without a model.

    OpenAI's fields that change nothing here are taken: `metadata`, `prompt_cache_key` and their like.
    """

    unserved: ClassVar[dict[str, tuple[object, ...]]] = {
        "tools": (None, []),
        "tool_choice": (None, "none"),
        "functions": (None, []),
        "function_call": (None, "none"),
        "audio": (None,),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "reasoning_effort": (None, "none"),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
        "moderation": (None,),
    }

    messages: Messages
    add_special_tokens: bool = Field(False, description="the tokenizer's own, beside those of the template")
    max_tokens: int | None = Field(None, ge=1, description="default: until the context is full")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    metadata: Metadata | None = None
    parallel_tool_calls: bool = Field(True, description="means nothing without tools")
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    safety_identifier: Text | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise InvalidRequestError(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) "
                "mean the same, but differ",
                param="max_tokens",
            )
        if self.token_limit is not None and self.min_tokens > self.token_limit:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.token_limit})",
                param="min_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed with logprobs: true", param="top_logprobs"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Under either name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None unless `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones at its place, likeliest first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """A whole answer. Fields that were not set are left out of the JSON."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class Delta(BaseModel):
    """What a chunk adds to a message: the role in the first one, then text."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """A chunk of a stream. Fields that were not set are left out of the JSON."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
