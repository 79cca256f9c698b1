"""Bodies of /v1/messages and /v1/messages/count_tokens, as Anthropic has them."""

from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from server.errors import quote
from server.limits import MAX_CONTENT_PARTS, MAX_EDITS, MAX_MESSAGES, MAX_STOP_STRINGS, MAX_TOOLS
from server.schemas.base import (
    INT64_MAX,
    Name,
    NonEmpty,
    RequestModel,
    Text,
    check_type,
    complain,
    each_of,
    type_of,
)
from server.schemas.sampling import TokenFields
from server.schemas.structured import JsonSchema
from server.schemas.tools import ToolName

CacheControl = Annotated[
    dict[str, Any] | None, Field(description="taken: the prefix cache finds by itself what prompts share")
]

# ---- what comes in --------------------------------------------------------------------------------


class TextBlock(RequestModel):
    """A text."""

    type: Literal["text"]
    text: Text
    cache_control: CacheControl = None
    citations: Annotated[list[Any], each_of(MAX_CONTENT_PARTS)] | None = Field(None, description="taken")


class ThinkingBlock(RequestModel):
    """Thoughts of an assistant, as they were sent out."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text = Field("", description="taken, not checked")
    cache_control: CacheControl = None


class RedactedThinkingBlock(RequestModel):
    """Thoughts that nobody here can read: they are left out."""

    type: Literal["redacted_thinking"]
    data: Text
    cache_control: CacheControl = None


class ToolUseBlock(RequestModel):
    """A call that an assistant asked for."""

    type: Literal["tool_use"]
    id: NonEmpty
    name: ToolName
    input: dict[str, Any]
    cache_control: CacheControl = None
    caller: dict[str, Any] | None = Field(None, description="taken and not needed")
    toolset_name: Name | None = Field(None, description="taken and not needed")


SystemBlock = Annotated[TextBlock, BeforeValidator(partial(check_type, served=("text",)))]


class ToolResultBlock(RequestModel):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: Text | Annotated[list[SystemBlock], each_of(MAX_CONTENT_PARTS)] = ""
    is_error: bool = Field(False, description="taken: the model reads the content alone")
    cache_control: CacheControl = None
    toolset_name: Name | None = Field(None, description="taken and not needed")

    @property
    def texts(self) -> list[str]:
        """The texts of the content."""
        return [self.content] if isinstance(self.content, str) else [block.text for block in self.content]


BLOCKS = {
    "text": "TextBlock",
    "thinking": "ThinkingBlock",
    "redacted_thinking": "RedactedThinkingBlock",
    "tool_use": "ToolUseBlock",
    "tool_result": "ToolResultBlock",
}
Block = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")]
    | Annotated[RedactedThinkingBlock, Tag("RedactedThinkingBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")],
    Discriminator(lambda block: BLOCKS[type_of(block, "text")]),
    BeforeValidator(partial(check_type, served=tuple(BLOCKS))),
]
OF_ROLE = {  # the blocks that may stand in a message
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


class AnthropicMessage(RequestModel):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Block], each_of(MAX_CONTENT_PARTS)]

    @field_validator("content")
    @classmethod
    def _check_blocks(cls, content: str | list[Block], info: ValidationInfo) -> str | list[Block]:
        allowed = OF_ROLE.get(info.data.get("role", ""), tuple(BLOCKS))
        for block in content if isinstance(content, list) else []:
            if block.type not in allowed:
                raise complain(
                    f"has a block of the type {block.type!r}, which a message of the role "
                    f"{info.data['role']!r} can't have"
                )
        return content

    @property
    def blocks(self) -> list[Block]:
        """The content as blocks."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content


class AnthropicTool(RequestModel):
    """A tool that the client runs."""

    type: Literal["custom"] = "custom"
    name: ToolName
    description: Text | None = None
    input_schema: JsonSchema
    strict: bool | None = None
    cache_control: CacheControl = None
    input_examples: Annotated[list[Any], each_of(MAX_CONTENT_PARTS)] | None = Field(None, description="taken")
    eager_input_streaming: bool | None = Field(None, description="taken: input is always sent as it comes")
    defer_loading: bool | None = Field(None, description="taken: a tool is always loaded")
    allowed_callers: Annotated[list[Name], each_of(MAX_TOOLS)] | None = Field(None, description="taken")


def _check_tool(value: object) -> object:
    if not isinstance(value, dict | BaseModel):
        raise complain(f"must be an object, not {quote(value)}")
    if isinstance(value, dict) and not isinstance(value.get("type", ""), str | None):
        raise complain(f"has the type {quote(value['type'])}, which is no text")
    return value


def _is_custom(tool: object) -> bool:
    return type_of(tool, "custom") in ("custom", "")


OTHER_TOOL = {
    "type": "object",
    "properties": {"type": {"type": "string", "not": {"enum": ["custom", ""]}}},
    "required": ["type"],
    "description": "a tool that Anthropic runs or knows: skipped, and named in the header x-speed-warning",
}
Tool = Annotated[
    Annotated[AnthropicTool, Tag("AnthropicTool")]
    | Annotated[dict[str, Any], Tag("other"), WithJsonSchema(OTHER_TOOL)],
    Discriminator(lambda tool: "AnthropicTool" if _is_custom(tool) else "other"),
    BeforeValidator(_check_tool),
]


class AnthropicToolChoice(RequestModel):
    """How tools are used; `name` with the type tool alone."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.name is None) == (self.type == "tool"):
            raise complain("needs a name with the type 'tool', and has none with another")
        return self


class AnthropicMetadata(RequestModel):
    """Who asks."""

    user_id: Name | None = Field(None, description="taken, not kept")


class Thinking(RequestModel):
    """Whether the model is to think first, where its template has the variable `enable_thinking`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, ge=1, le=INT64_MAX, description="taken: max_tokens is the limit")
    display: Name | None = Field(None, description="taken: thoughts are shown as they are")


class OutputFormat(RequestModel):
    """JSON after a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema = Field(alias="schema")


class OutputConfig(RequestModel):
    """`effort` is a variable of the model's template, `reasoning_effort`."""

    effort: Name | None = None
    format: OutputFormat | None = None


class Edit(RequestModel):
    """An edit of the context that changes nothing: the only one that is served."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(RequestModel):
    """Nothing is taken out of a conversation here."""

    edits: Annotated[list[Edit], each_of(MAX_EDITS)] = Field(default=[])


class PromptFields(RequestModel):
    """What makes the prompt. Fields that can't change the text are taken."""

    unserved: ClassVar[dict[str, tuple[object, ...]]] = {
        "container": (None,),
        "mcp_servers": (None, []),
    }

    model: str
    messages: Annotated[list[AnthropicMessage], each_of(MAX_MESSAGES, least=1)]
    system: Text | Annotated[list[SystemBlock], each_of(MAX_CONTENT_PARTS)] = ""
    tools: Annotated[list[Tool], each_of(MAX_TOOLS)] = Field(default=[])
    tool_choice: AnthropicToolChoice = AnthropicToolChoice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = Field(None, description="the older name of output_config.format")
    context_management: ContextManagement | None = None
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="further variables of the template")
    cache_control: CacheControl = None
    speed: Name | None = Field(None, description="taken: there is one speed")
    user_profile_id: Name | None = Field(None, description="taken, not kept")
    workspace_id: Name | None = Field(None, description="taken, not kept")


class MessagesRequest(PromptFields, TokenFields):
    """A request as far as it can be judged without a model."""

    max_tokens: int = Field(
        ge=1, le=INT64_MAX, description="more than fits is no error: the context's end ends the answer"
    )
    stop_sequences: Annotated[list[NonEmpty], each_of(MAX_STOP_STRINGS)] = Field(default=[])
    stream: bool = False
    metadata: AnthropicMetadata | None = None
    service_tier: Name | None = Field(None, description="taken: there is one tier")
    inference_geo: Name | None = Field(None, description="taken")
    diagnostics: dict[str, Any] | None = Field(None, description="taken")


class CountTokensRequest(PromptFields):
    """A prompt whose tokens are to be counted."""


# ---- what goes out --------------------------------------------------------------------------------


class OutputTextBlock(BaseModel):
    """A text."""

    type: Literal["text"] = "text"
    text: str
    citations: None


class OutputThinkingBlock(BaseModel):
    """Thoughts. Clients want a signature to send them back: it is a digest, and nobody checks it."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str


class OutputToolUseBlock(BaseModel):
    """A tool that the model wants to have run."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


OutputBlock = OutputTextBlock | OutputThinkingBlock | OutputToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class ThinkingDetails(BaseModel):
    """Tokens of thoughts among those of the answer."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """What a request cost. The prompt is `input_tokens` and `cache_read_input_tokens` together."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingDetails


class MessageObject(BaseModel):
    """A message, whole or as it begins."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None
    usage: MessageUsage


class BlockDelta(BaseModel):
    """What an event adds to a block; fields that its type doesn't have were not set."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    partial_json: str | None = None


class MessageDelta(BaseModel):
    """Why a message ended."""

    stop_reason: StopReason
    stop_sequence: str | None
    stop_details: None


class AnthropicErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """The body of every answer on these paths that isn't a success."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class MessageEvent(BaseModel):
    """An event of a stream; fields that its type doesn't have were not set, and are left out of the JSON."""

    type: str
    message: MessageObject | None = None
    index: int | None = None
    content_block: OutputBlock | None = None
    delta: BlockDelta | MessageDelta | None = None
    usage: MessageUsage | None = None
    error: AnthropicErrorDetail | None = None
    request_id: str | None = None


class TokenCount(BaseModel):
    """How many tokens the prompt has."""

    input_tokens: int
