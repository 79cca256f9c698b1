"""Bodies of /v1/chat/completions."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, StringConstraints, field_validator, model_validator

from server.errors import InvalidRequestError, quote
from server.limits import MAX_CONTENT_PARTS, MAX_MESSAGES
from server.schemas.base import Name, RequestModel, Text, at_most, complain, each_of
from server.schemas.prompt_scores import PromptScores
from server.schemas.sampling import MAX_LOGPROBS, NO_LIMIT, SamplingFields, agreed_limit
from server.schemas.usage import Usage

MAX_METADATA = 16
OTHER_ROLES = ("tool", "function")  # OpenAI's, but nothing without tools


class TextPart(RequestModel):
    """A part of a message."""

    unserved: ClassVar[dict[str, tuple[object, ...]]] = {"annotations": (None, [])}

    type: Literal["text"]
    text: Text
    cache_control: dict[str, Any] | None = Field(None, description="taken and not needed")
    id: Name | None = Field(None, description="taken and not needed")

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, data: object) -> object:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise complain(f"has the type {quote(kind)}, which is not supported: only text is")
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
    content: Text | Annotated[list[TextPart], each_of(MAX_CONTENT_PARTS)] | None = Field(
        None, description="only an assistant's may be absent"
    )
    name: Name | None = None
    reasoning_content: Text | None = Field(
        None, description="an assistant's thoughts, for templates that show them"
    )
    reasoning: Text | None = Field(None, description="another name of reasoning_content")
    id: Name | None = Field(None, description="taken and not needed")
    cache_control: dict[str, Any] | None = Field(None, description="taken and not needed")
    provider_specific_fields: dict[str, Any] | None = Field(None, description="taken and not needed")

    @field_validator("role", mode="before")
    @classmethod
    def _check_role(cls, role: object) -> object:
        if role in OTHER_ROLES:
            raise complain(f"{role!r} is not supported: this server has no tools")
        return role

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise complain(f"has no content, which is required of the role {self.role!r}")
        if self.thoughts and self.role != "assistant":
            raise complain(
                f"has reasoning, which only an assistant's message may have, not a {self.role!r}'s"
            )
        if self.reasoning and self.reasoning_content and self.reasoning != self.reasoning_content:
            raise complain("has reasoning and reasoning_content, which mean the same, but differ")
        return self

    @property
    def thoughts(self) -> str:
        """The reasoning under either name; empty if there is none."""
        return self.reasoning_content or self.reasoning or ""

    @property
    def texts(self) -> str | list[str]:
        """The content: a text, or those of its parts."""
        if isinstance(self.content, list):
            return [part.text for part in self.content]
        return self.content or ""

    @property
    def num_characters(self) -> int:
        """Characters of all texts of the content and of the reasoning together."""
        content = len(self.texts) if isinstance(self.texts, str) else sum(map(len, self.texts))
        return content + len(self.thoughts)


Messages = Annotated[list[Message], each_of(MAX_MESSAGES, least=1)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=MAX_METADATA),
    at_most(MAX_METADATA),
]


TEMPLATE_OWN = ("messages", "tools", "documents", "add_generation_prompt")  # no kwargs of a template


class TemplateFields(RequestModel):
    """How messages become a prompt."""

    add_generation_prompt: bool = Field(True, description="end with what begins the assistant's turn")
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="further variables of the template")
    reasoning_effort: Name | None = Field(
        None, description="the template's variable of that name; changes nothing where it has none"
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_names(cls, variables: dict[str, Any]) -> dict[str, Any]:
        for name in variables:
            if name in TEMPLATE_OWN:
                raise complain(f"has {name!r}, which is the template's own variable and can't be given here")
            if not name.isidentifier():
                raise complain(f"has {quote(name)}, which is not the name of a variable")
        return variables

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template gets besides the messages."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | self.chat_template_kwargs


class ChatRequest(SamplingFields, TemplateFields):
    """A request as far as it can be judged without a model.

    OpenAI's fields that can't change the text are taken: `metadata`, `store`, `verbosity` and their like.
    """

    unserved: ClassVar[dict[str, tuple[object, ...]]] = {
        "tools": (None, []),
        "tool_choice": (None, "none"),
        "functions": (None, []),
        "function_call": (None, "none"),
        "audio": (None,),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "web_search_options": (None,),
        "moderation": (None,),
    }

    messages: Messages
    add_special_tokens: bool = Field(False, description="the tokenizer's own, beside those of the template")
    max_tokens: int | None = Field(
        None, ge=NO_LIMIT, description="at least 1; default, null or -1: until the context is full"
    )
    max_completion_tokens: int | None = Field(None, ge=NO_LIMIT, description="the newer name of max_tokens")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    metadata: Metadata | None = None
    parallel_tool_calls: bool = Field(True, description="means nothing without tools")
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None
    safety_identifier: Name | None = None
    service_tier: Name | None = Field(None, description="taken: there is one tier")
    store: bool = Field(False, description="taken: nothing is stored")
    verbosity: Name | None = Field(None, description="taken: no model here has such a switch")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise InvalidRequestError(f"{name} is 0; at least 1 is needed", param=name)
        if self.token_limit is not None and self.min_tokens > self.token_limit:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.token_limit})",
                param="min_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed with logprobs: true", param="top_logprobs"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Under either name."""
        limit = agreed_limit(self.max_tokens, self.max_completion_tokens)
        return None if limit == NO_LIMIT else limit

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
    prompt_logprobs: PromptScores | None = None


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
