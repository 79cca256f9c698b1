"""Bodies of /tokenize and /detokenize, as in vLLM."""

from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from server.errors import InvalidRequestError
from server.limits import MAX_IDS
from server.schemas.base import RequestModel, Text, TokenId, each_of
from server.schemas.chat import Messages, TemplateFields


class TokenizeRequest(TemplateFields):
    """Either a text or a conversation. Special tokens are added to a text unless asked otherwise."""

    model: str | None = Field(None, description="default: the served one")
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="the tokenizer's own; default: true for a prompt, false for messages"
    )
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("exactly one of prompt and messages is needed", param="prompt")
        return self


class TokenizeResponse(BaseModel):
    """The tokens, as ids and if asked as the vocabulary writes them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Ids of the model's vocabulary."""

    model: str | None = Field(None, description="default: the served one")
    tokens: Annotated[list[TokenId], each_of(MAX_IDS)]


class DetokenizeResponse(BaseModel):
    """Their text, special tokens included."""

    prompt: str
