"""Bodies of /v1/chat/completions."""

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, Field, StringConstraints, field_validator, model_validator

from server.errors import InvalidRequestError, quote
from server.limits import MAX_CONTENT_PARTS, MAX_MESSAGES, MAX_TOOLS
from server.schemas.base import Name, RequestModel, Text, at_most, complain, each_of
from server.schemas.loop_scores import LoopToken
from server.schemas.prompt_scores import PromptScores
from server.schemas.sampling import MAX_LOGPROBS, NO_LIMIT, SamplingFields, agreed_limit
from server.schemas.tools import FunctionDefinition, ToolCallMessage, ToolChoice, ToolChoiceObject, Tools
from server.schemas.usage import Usage
from server.schemas.wave import Wave

MAX_METADATA = 16


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
        "function_call": (None,),
        "audio": (None,),
        "annotations": (None, []),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], each_of(MAX_CONTENT_PARTS)] | None = Field(
        None, description="only an assistant's may be absent"
    )
    name: Name | None = None
    tool_calls: Annotated[list[ToolCallMessage], each_of(MAX_TOOLS)] = Field(
        default=[], description="an assistant's, as they were sent out"
    )
    tool_call_id: Name | None = Field(None, description="of the call that a tool answers")
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
        if role == "function":
            raise complain("'function' is not supported: results of tools have the role 'tool'")
        return role

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise complain(f"has no content, which is required of the role {self.role!r}")
        if self.thoughts and self.role != "assistant":
            raise complain(
                f"has reasoning, which only an assistant's message may have, not a {self.role!r}'s"
            )
        if self.tool_calls and self.role != "assistant":
            raise complain(
                f"has tool_calls, which only an assistant's message may have, not a {self.role!r}'s"
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
        """Characters of all texts of the content, the reasoning and the calls together."""
        content = len(self.texts) if isinstance(self.texts, str) else sum(map(len, self.texts))
        calls = sum(len(str(call.function.arguments)) for call in self.tool_calls)
        return content + len(self.thoughts) + calls


Messages = Annotated[list[Message], each_of(MAX_MESSAGES, least=1)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=MAX_METADATA),
    at_most(MAX_METADATA),
]


TEMPLATE_OWN = ("messages", "tools", "documents", "add_generation_prompt")  # no kwargs of a template


class TemplateFields(RequestModel):
    """How messages become a prompt."""

    tools: Tools = Field(default=[], description="what the model may call")
    add_generation_prompt: bool = Field(True, description="end with what begins the assistant's turn")
    continue_final_message: bool = Field(
        False, description="end with the last message as it is, for the model to go on; no generation prompt"
    )
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

    @model_validator(mode="after")
    def _check_ending(self) -> Self:
        asked = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and asked:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt can't both be true",
                param="continue_final_message",
            )
        counts = Counter(tool.function.name for tool in self.tools)
        for name, count in counts.most_common(1):
            if count > 1:
                raise InvalidRequestError(f"tools: {count} are called {quote(name)}", param="tools")
        return self

    @property
    def functions_shown(self) -> list[FunctionDefinition]:
        """The functions that the template is told of."""
        return [tool.function for tool in self.tools]

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template gets besides the messages."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | self.chat_template_kwargs


class ToolUse(NamedTuple):
    """Which tools may be called, and how an answer is made to do so.

    `allowed` is empty where there are none. `is_guided`: a grammar sees to it that calls match their schemas.
    """

    allowed: list[FunctionDefinition]
    must_call: bool = False
    most_calls: int | None = None  # None: as many as the model likes
    is_guided: bool = False


class ChatRequest(SamplingFields, TemplateFields):
    """A request as far as it can be judged without a model.

    OpenAI's fields that can't change the text are taken: `metadata`, `store`, `verbosity` and their like.
    """

    unserved: ClassVar[dict[str, tuple[object, ...]]] = {
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
    tool_choice: ToolChoice | None = Field(None, description="default: auto")
    parallel_tool_calls: bool = Field(True, description="false: at most one call in an answer")
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
        self._check_tool_choice()
        return self

    def _check_tool_choice(self) -> None:
        if self.tool_choice in (None, "none", "auto"):
            return
        if not self.tools:
            raise InvalidRequestError(
                "tool_choice asks for a call, but there are no tools", param="tool_choice"
            )
        names = {tool.function.name for tool in self.tools}
        for name in self._chosen_names():
            if name not in names:
                raise InvalidRequestError(
                    f"tool_choice names {quote(name)}, which is none of the tools", param="tool_choice"
                )

    def _chosen_names(self) -> list[str]:
        """The tools that `tool_choice` names."""
        if not isinstance(self.tool_choice, ToolChoiceObject):
            return []
        if self.tool_choice.function is not None:
            return [self.tool_choice.function.name]
        assert self.tool_choice.allowed_tools is not None
        return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]

    @property
    def functions_shown(self) -> list[FunctionDefinition]:
        """The functions that the template is told of: none if none may be called."""
        return [] if self.tool_choice == "none" else super().functions_shown

    @property
    def tool_use(self) -> ToolUse:
        """Which tools may be called."""
        shown, chosen = self.functions_shown, self._chosen_names()
        most = None if self.parallel_tool_calls else 1
        if not isinstance(self.tool_choice, ToolChoiceObject):
            must_call = self.tool_choice == "required"
            is_guided = must_call or any(function.strict for function in shown)
            return ToolUse(shown, must_call, most, is_guided)
        allowed = [function for function in shown if function.name in chosen]
        if self.tool_choice.allowed_tools is None:
            return ToolUse(allowed, must_call=True, most_calls=1, is_guided=True)
        must_call = self.tool_choice.allowed_tools.mode == "required"
        return ToolUse(allowed, must_call, most, is_guided=True)

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


class AnsweredFunction(BaseModel):
    """What a call asks for. `arguments` is the text of a JSON object, unless the answer was cut off."""

    name: str
    arguments: str


class AnsweredCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AssistantMessage(BaseModel):
    """The answer: its text, null if there are calls alone; thoughts under both of their names."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "tool_calls", "length", "abort"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    loop_logprobs: list[LoopToken] | None = None


class ChatResponse(BaseModel):
    """A whole answer. Fields that were not set are left out of the JSON."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    lossy: list[str] | None = Field(None, description="fields by which the text may not be the model's own")
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptScores | None = None


class FunctionDelta(BaseModel):
    """The name of a function, in the first delta of a call, and a part of its arguments."""

    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    """What a chunk adds to a call; `id` and `type` stand in the first delta of a call alone."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What a chunk adds to a message: the role in the first one, then text, thoughts or a call."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "tool_calls", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    loop_logprobs: list[LoopToken] | None = None
    wave: Wave | None = None


class ChatChunk(BaseModel):
    """A chunk of a stream. Fields that were not set are left out of the JSON."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    lossy: list[str] | None = None
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
