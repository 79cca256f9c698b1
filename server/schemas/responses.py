"""Bodies of /v1/responses, stateless: what comes in, what goes out, and the events of a stream.

A conversation is a text or a list of items: messages, calls of functions, what these gave, and thoughts.
"""

from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, WithJsonSchema

from server.errors import quote
from server.limits import (
    MAX_ANNOTATIONS,
    MAX_CONTENT_PARTS,
    MAX_INCLUDES,
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    MAX_TOOLS,
)
from server.schemas.base import Name, NonEmpty, RequestModel, Text, check_type, complain, each_of, type_of
from server.schemas.chat import Metadata, TokenLogprob
from server.schemas.sampling import MAX_LOGPROBS, TokenFields
from server.schemas.structured import JsonSchema, StructuredOutputs
from server.schemas.tools import ToolName

STATELESS = "nothing is kept here, send the whole conversation in input"
Anything = Annotated[list[Any], each_of(MAX_ANNOTATIONS)]  # lists that are sent back as they were received


# ---- what comes in --------------------------------------------------------------------------------


class InputText(RequestModel):
    """A text of a message; `output_text` is one that an assistant wrote."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: Anything = Field(default=[], description="taken and not needed")
    logprobs: Anything = Field(default=[], description="taken and not needed")
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description="taken and not needed")


class InputRefusal(RequestModel):
    """What an assistant wrote in place of an answer."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """Its text."""
        return self.refusal


class ThoughtText(RequestModel):
    """A part of an assistant's thoughts, or of their summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


TEXTS = ("input_text", "output_text", "text")
PARTS = (*TEXTS, "refusal")
Part = Annotated[
    Annotated[InputText, Tag("InputText")] | Annotated[InputRefusal, Tag("InputRefusal")],
    Discriminator(lambda part: "InputRefusal" if type_of(part) == "refusal" else "InputText"),
    BeforeValidator(partial(check_type, served=PARTS)),
]
TextPart = Annotated[InputText, BeforeValidator(partial(check_type, served=TEXTS))]


class Item(RequestModel):
    """What items of all types may have beside their content: taken, and not needed."""

    id: Name | None = None
    status: Name | None = None
    phase: Name | None = None
    namespace: Name | None = None
    caller: dict[str, Any] | None = None


class InputMessage(Item):
    """A turn of the conversation. `type` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[Part], each_of(MAX_CONTENT_PARTS)]


class FunctionCall(Item):
    """A call that an assistant asked for; `arguments` is the text of a JSON object."""

    type: Literal["function_call"]
    call_id: NonEmpty
    name: ToolName
    arguments: Text
    is_async: bool | None = Field(None, alias="async")


class FunctionCallOutput(Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: NonEmpty
    output: Text | Annotated[list[TextPart], each_of(MAX_CONTENT_PARTS)]
    name: Name | None = None


class Reasoning(Item):
    """Thoughts of an assistant. Only their text is of use: this server encrypts nothing."""

    type: Literal["reasoning"]
    summary: Annotated[list[ThoughtText], each_of(MAX_CONTENT_PARTS)] = Field(default=[])
    content: Annotated[list[ThoughtText], each_of(MAX_CONTENT_PARTS)] = Field(default=[])
    encrypted_content: Text | None = Field(None, description="taken, and not readable here")


ITEMS = {
    "message": InputMessage.__name__,
    "function_call": FunctionCall.__name__,
    "function_call_output": FunctionCallOutput.__name__,
    "reasoning": Reasoning.__name__,
}


InputItem = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[FunctionCall, Tag("FunctionCall")]
    | Annotated[FunctionCallOutput, Tag("FunctionCallOutput")]
    | Annotated[Reasoning, Tag("Reasoning")],
    Discriminator(lambda item: ITEMS[type_of(item, "message")]),
    BeforeValidator(partial(check_type, served=tuple(ITEMS))),
]


class FunctionTool(RequestModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None
    output_schema: JsonSchema | None = Field(None, description="taken and not needed")
    defer_loading: bool | None = Field(None, description="taken: a tool is always loaded")
    allowed_callers: Annotated[list[Name], each_of(MAX_TOOLS)] | None = Field(None, description="taken")
    is_async: bool | None = Field(None, alias="async", description="taken and not needed")


def _check_tool(value: object) -> object:
    if not isinstance(value, dict | BaseModel):
        raise complain("must be an object")
    if isinstance(value, dict) and not isinstance(value.get("type"), str):
        raise complain("has no type")
    return value


OTHER_TOOL = {
    "type": "object",
    "properties": {"type": {"type": "string", "not": {"enum": ["function"]}}},
    "required": ["type"],
    "description": "a tool of another type: skipped, and named in the header x-speed-warning",
}
Tool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")]
    | Annotated[dict[str, Any], Tag("other"), WithJsonSchema(OTHER_TOOL)],
    Discriminator(lambda tool: "FunctionTool" if type_of(tool) == "function" else "other"),
    BeforeValidator(_check_tool),
]


class ChosenFunction(RequestModel):
    """The function that must be called."""

    type: Literal["function"]
    name: ToolName


class AllowedFunctions(RequestModel):
    """The functions among `tools` that may be called now."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[ChosenFunction, BeforeValidator(partial(check_type, served=("function",)))]],
        each_of(MAX_TOOLS, least=1),
    ]


WORDS = ("none", "auto", "required")


def _check_choice(value: object) -> object:
    if isinstance(value, str) and value not in WORDS:
        raise complain(f"is {quote(value)}; one of {', '.join(WORDS)}, or an object, is wanted")
    return value if isinstance(value, str) else check_type(value, ("function", "allowed_tools"))


def _choice_tag(choice: object) -> str:
    if isinstance(choice, str):
        return "word"
    return "AllowedFunctions" if type_of(choice) == "allowed_tools" else "ChosenFunction"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[ChosenFunction, Tag("ChosenFunction")]
    | Annotated[AllowedFunctions, Tag("AllowedFunctions")],
    Discriminator(_choice_tag),
    BeforeValidator(_check_choice),
]


class TextFormat(RequestModel):
    """Any text, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Text | None = None
    json_schema: JsonSchema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(RequestModel):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Name | None = Field(None, description="taken: no model here has such a switch")


class ReasoningSettings(RequestModel):
    """`effort` is a variable of the model's template; the others change nothing."""

    effort: Name | None = None
    summary: Name | None = Field(None, description="taken: thoughts are shown as they are, not summed up")
    generate_summary: Name | None = Field(None, description="taken: the older name of summary")
    context: Name | None = Field(
        None, description="taken: the template decides which thoughts are read again"
    )
    mode: Name | None = Field(None, description="taken")


class ResponseStreamOptions(RequestModel):
    """Nothing in it changes a text."""

    include_obfuscation: bool = Field(False, description="taken: no frame is padded")
    reasoning_summary_delivery: Name | None = Field(None, description="taken: there are no summaries")


class ResponsesRequest(TokenFields):
    """A request as far as it can be judged without a model.

    OpenAI's fields that can't change the text are taken: `metadata`, `store`, `include` and their like.
    """

    unserved: ClassVar[dict[str, tuple[object, ...]]] = {
        "previous_response_id": (None,),
        "conversation": (None,),
        "prompt": (None,),
        "background": (None, False),
        "background_options": (None,),
        "context_management": (None, []),
        "moderation": (None,),
        "image": (None,),
    }
    hints: ClassVar[dict[str, str]] = {
        "previous_response_id": STATELESS,
        "conversation": STATELESS,
        "prompt": "send its text in instructions and input",
        "background": "nothing is kept here, wait for the answer or stream it",
    }

    model: str
    input: Text | Annotated[list[InputItem], each_of(MAX_MESSAGES)]
    instructions: Text | None = Field(None, description="a system message before all others")
    max_output_tokens: int | None = Field(None, ge=1, description="default: until the context is full")
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[Tool], each_of(MAX_TOOLS)] = Field(default=[])
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextSettings = TextSettings()
    structured_outputs: StructuredOutputs | None = None
    reasoning: ReasoningSettings = ReasoningSettings()
    include: Annotated[list[Name], each_of(MAX_INCLUDES)] = Field(
        default=[], description="message.output_text.logprobs is served; others are taken"
    )
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="auto: of a prompt that is too long its end is kept"
    )
    stop: NonEmpty | Annotated[list[NonEmpty], each_of(MAX_STOP_STRINGS)] = Field(default=[])
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="further variables of the template")
    metadata: Metadata = Field(default={}, description="sent back")
    store: bool = Field(True, description="taken: nothing is stored")
    max_tool_calls: int | None = Field(None, ge=1, description="taken: there are no built-in tools")
    service_tier: Name | None = Field(None, description="taken: there is one tier")
    prompt_cache_key: Name | None = Field(None, description="taken and not needed")
    prompt_cache_retention: Name | None = Field(None, description="taken and not needed")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="taken and not needed")
    safety_identifier: Name | None = Field(None, description="taken, not kept")
    user: Name | None = Field(None, description="taken, not kept")
    client_metadata: dict[str, Any] | None = Field(None, description="taken, not kept; Codex sends it")
    access_programs: dict[str, Any] | list[Any] | None = Field(None, description="taken")

    @property
    def items(self) -> list[InputItem]:
        """The input as items; a text is what a user said."""
        if isinstance(self.input, str):
            return [InputMessage(role="user", content=self.input)]
        return self.input

    @property
    def shows_logprobs(self) -> bool:
        """Whether log-probabilities of the answer's tokens are wanted."""
        return "message.output_text.logprobs" in self.include or self.top_logprobs > 0


# ---- what goes out --------------------------------------------------------------------------------

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputThought(BaseModel):
    """The text of thoughts."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputMessage(BaseModel):
    """What the model answers."""

    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputReasoning(BaseModel):
    """What the model thought before."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: Status
    summary: list[Any]
    content: list[OutputThought]


class OutputCall(BaseModel):
    """A function that the model wants to have called."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(BaseModel):
    """How much of the prompt was found in the prefix cache. Writing it costs nothing and isn't counted."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """Tokens of thoughts; ours: drafts confirmed and contradicted at full depth, passes after token one."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    decode_passes: int


class ResponseUsage(BaseModel):
    """What a request cost."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    """Why a response failed."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class IncompleteDetails(BaseModel):
    """Why a response ends before its end."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """A response, whole or in progress. What the client sent is sent back with the defaults filled in."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    background: Literal[False] = False
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(BaseModel):
    """An event of a stream; fields that its type doesn't have were not set, and are left out of the JSON."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int | None = None
    item_id: str | None = None
    item: OutputItem | None = None
    content_index: int | None = None
    part: OutputText | OutputThought | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[TokenLogprob] | None = None
