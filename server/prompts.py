"""Prompts as the model reads them: texts, ids, fill-in-the-middle, conversations; cut if that was asked.

Synchronous and slow for long prompts: call in a thread. Raises InvalidRequestError for whatever cannot
be a prompt of the model.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from model.protocol import EngineInfo
from server.chat_template import ChatTemplate
from server.errors import InvalidRequestError
from server.schemas.chat import ChatRequest, Message, TemplateFields
from server.schemas.completions import CompletionRequest
from server.schemas.sampling import SamplingFields
from server.text import token_starts
from server.tokenizer import TextCodec


class EncodedPrompt(NamedTuple):
    """A prompt as the model reads it, and for an echo its text.

    `starts` says where in the text each token begins; empty unless an echo with log-probabilities needs it.
    """

    token_ids: list[int]
    text: str = ""
    starts: Sequence[int] = ()


def encode_completion(body: CompletionRequest, codec: TextCodec, info: EngineInfo) -> list[EncodedPrompt]:
    """The prompts of a completion request."""
    if not body.prompts:
        raise InvalidRequestError("prompt is empty", param="prompt")
    if body.suffix and codec.fill_tokens is None:
        raise InvalidRequestError(
            "suffix: the model's tokenizer has no tokens for filling in the middle", param="suffix"
        )
    return [_encode_prompt(prompt, body, codec, info) for prompt in body.prompts]


def encode_chat(
    body: ChatRequest, codec: TextCodec, template: ChatTemplate | None, info: EngineInfo
) -> list[EncodedPrompt]:
    """The one prompt of a conversation."""
    ids = conversation_ids(body.messages, body, codec, template, add_special_tokens=body.add_special_tokens)
    if not ids:
        raise InvalidRequestError("messages: the chat template makes no text of them", param="messages")
    return [EncodedPrompt(_truncate(ids, body, info))]


def conversation_ids(
    messages: Sequence[Message],
    fields: TemplateFields,
    codec: TextCodec,
    template: ChatTemplate | None,
    *,
    add_special_tokens: bool,
) -> list[int]:
    """A conversation through the model's template. Templates write their special tokens themselves."""
    if template is None:
        raise InvalidRequestError(
            "the model has no chat template, so it cannot read messages: start the server with "
            "--chat-template FILE, or use /v1/completions",
            param="messages",
        )
    text = template.render(
        [message.for_template() for message in messages],
        add_generation_prompt=fields.add_generation_prompt,
        variables=fields.chat_template_kwargs,
    )
    return codec.encode(text, add_special_tokens=add_special_tokens)


def check_vocabulary(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequestError for an id that the model doesn't have."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequestError(
            f"{param}: {largest} is no token id; ids are 0 to {vocab_size - 1}", param=param
        )


def _encode_prompt(
    prompt: str | list[int], body: CompletionRequest, codec: TextCodec, info: EngineInfo
) -> EncodedPrompt:
    ids = _read(prompt, body, codec, info)
    if not ids:
        raise InvalidRequestError("prompt is empty: the model needs at least one token", param="prompt")
    kept = _truncate(ids, body, info)
    if not body.echo:
        return EncodedPrompt(kept)
    decode = partial(codec.decode, skip_special_tokens=body.skip_special_tokens)
    text = prompt if isinstance(prompt, str) and kept is ids else decode(kept)
    starts = token_starts(decode, kept) if body.logprobs is not None else ()
    return EncodedPrompt(kept, text, starts)


def _read(prompt: str | list[int], body: CompletionRequest, codec: TextCodec, info: EngineInfo) -> list[int]:
    if isinstance(prompt, str):
        if not body.suffix:
            return codec.encode(prompt) if prompt else []
        prompt = codec.encode(prompt, add_special_tokens=False)
    check_vocabulary("prompt", prompt, info.vocab_size)
    return codec.fill_in_the_middle(prompt, body.suffix) if body.suffix else prompt


def _truncate(ids: list[int], body: SamplingFields, info: EngineInfo) -> list[int]:
    """The last `truncate_prompt_tokens` ids; for -1 what the context holds beside the completion."""
    if body.truncate_prompt_tokens is None:
        return ids
    most = info.max_model_len - (1 if body.token_limit is None else body.token_limit)
    limit = most if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    return ids if len(ids) <= limit or limit < 1 else ids[-limit:]
