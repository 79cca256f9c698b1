"""Prompts as the model reads them: texts, ids, fill-in-the-middle, conversations; cut if that was asked.

Synchronous and slow for long prompts: call in a thread. Raises InvalidRequestError for whatever cannot
be a prompt of the model.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from model.protocol import EngineInfo, RequestOptions
from model.rules import check_prompt, check_token_ids, num_tokens_before
from server.chat_template import ChatTemplate
from server.conversation import opens_thoughts, render_conversation, template_input
from server.errors import InvalidRequestError, TextTooLongError, quote, rules_as_refusals
from server.limits import longest_text, usual_text
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


class RenderedChat(NamedTuple):
    """What the template made of a conversation.

    `is_disguised`: with control tokens in it that are text; `opens_thoughts`: what follows it is thoughts.
    """

    text: str
    is_disguised: bool
    opens_thoughts: bool = False


def encode_completion(
    body: CompletionRequest, codec: TextCodec, info: EngineInfo, num_taken: int = 0
) -> list[EncodedPrompt]:
    """The prompts of a completion request; `num_taken` tokens of the context are taken beside them."""
    if not body.prompts:
        raise InvalidRequestError("prompt is empty", param="prompt")
    if body.suffix and codec.fill_tokens is None:
        raise InvalidRequestError(
            "suffix: the model's tokenizer has no tokens for filling in the middle", param="suffix"
        )
    return [_encode_prompt(prompt, body, codec, info, num_taken) for prompt in body.prompts]


def encode_decoder_prompt(body: CompletionRequest, codec: TextCodec, info: EngineInfo) -> list[int]:
    """The ids of what a decoder's text begins with, behind its start token; no special token is added."""
    given = body.decoder_prompt
    if not isinstance(given, str):
        return given or []
    ids = encode_text("decoder_prompt", given, codec, info, add_special_tokens=False) if given else []
    _check_embedded("decoder_prompt", ids, codec, info.vocab_size)
    return ids


def check_lengths(body: CompletionRequest, codec: TextCodec, info: EngineInfo) -> int:
    """How many characters must be tokenised. Raises TextTooLongError for a text that can't fit."""
    cut = body.truncate_prompt_tokens is not None
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    for text in texts:
        check_length("prompt", text, codec, info, cut=cut)
    others = {"suffix": body.suffix, "decoder_prompt": body.decoder_prompt}
    given = {field: text for field, text in others.items() if isinstance(text, str)}
    for field, text in given.items():
        check_length(field, text, codec, info)
    return sum(map(len, [*texts, *given.values()]))


def check_length(param: str, text: str, codec: TextCodec, info: EngineInfo, *, cut: bool = False) -> None:
    """Raises TextTooLongError for a text that no tokeniser needs to see.

    `cut`: only the end of it is wanted, so that it may be longer than the context, but within reason.
    """
    most = usual_text(info) if cut else longest_text(info, codec.longest_piece)
    if len(text) > most:
        raise TextTooLongError(len(text), info.max_model_len, param=param)


def encode_text(
    param: str, text: str, codec: TextCodec, info: EngineInfo, *, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a text whose length was checked. Raises TextTooLongError.

    Of a text that is longer than what usually fits only the beginning is tokenised if that alone is
    too much: a million digits are a million tokens, which take seconds and hundreds of megabytes.
    """
    _check_beginning(param, text, codec, info)
    return codec.encode(text, add_special_tokens=add_special_tokens)


def encode_rendered(
    said: RenderedChat, codec: TextCodec, info: EngineInfo, *, add_special_tokens: bool
) -> list[int]:
    """The ids of a conversation. Templates write their special tokens themselves; no text holds one."""
    if not said.is_disguised:
        return encode_text("messages", said.text, codec, info, add_special_tokens=add_special_tokens)
    _check_beginning("messages", codec.disguise.show(said.text), codec, info)
    return codec.disguise.encode(said.text, add_special_tokens=add_special_tokens)


def _check_beginning(param: str, text: str, codec: TextCodec, info: EngineInfo) -> None:
    usual = usual_text(info)
    if len(text) > usual and len(codec.encode(text[:usual])) > info.max_model_len:
        raise TextTooLongError(len(text), info.max_model_len, param=param)


def render(
    messages: Sequence[Message],
    fields: TemplateFields,
    codec: TextCodec,
    template: ChatTemplate | None,
    info: EngineInfo,
) -> RenderedChat:
    """A conversation through the model's template."""
    if template is None:
        raise InvalidRequestError(
            "the model has no chat template, so it cannot read messages: start the server with "
            "--chat-template FILE, or use /v1/completions",
            param="messages",
        )
    functions = fields.functions_shown
    for param, num_characters in {
        "tools": sum(function.num_characters for function in functions),
        "messages": sum(message.num_characters for message in messages),
    }.items():
        if num_characters > longest_text(info, codec.longest_piece):
            raise TextTooLongError(num_characters, info.max_model_len, param=param)
    disguise = None if template.trusts_content else codec.disguise
    given = template_input(messages, functions, fields.template_variables, disguise)
    text = render_conversation(
        template,
        given,
        add_generation_prompt=fields.add_generation_prompt and not fields.continue_final_message,
        continue_final=fields.continue_final_message,
    )
    check_length("messages", text, codec, info)
    final = given.messages[-1] if fields.continue_final_message else None
    return RenderedChat(text, given.is_disguised, opens_thoughts(text, final))


def encode_conversation(
    said: RenderedChat, body: ChatRequest, codec: TextCodec, info: EngineInfo
) -> EncodedPrompt:
    """The prompt of a rendered conversation."""
    ids = encode_rendered(said, codec, info, add_special_tokens=body.add_special_tokens)
    if not ids:
        raise InvalidRequestError("messages: the chat template makes no text of them", param="messages")
    _check_embedded("messages", ids, codec, info.vocab_size)
    return EncodedPrompt(_truncate(ids, body, info, num_tokens_before(0, RequestOptions(), info)))


def check_vocabulary(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequestError for an id that the model doesn't have."""
    with rules_as_refusals():
        check_token_ids(param, token_ids, vocab_size)


def _check_embedded(param: str, ids: Sequence[int], codec: TextCodec, vocab_size: int) -> None:
    """Raises InvalidRequestError for a text with a token that the tokenizer has and the model lacks."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequestError(
            f"{param}: the text holds the token {quote(codec.piece(largest))}, whose id {largest} has no "
            f"embedding in the model; ids are 0 to {vocab_size - 1}",
            param=param,
        )


def _encode_prompt(
    prompt: str | list[int], body: CompletionRequest, codec: TextCodec, info: EngineInfo, num_taken: int
) -> EncodedPrompt:
    ids = _read(prompt, body, codec, info)
    with rules_as_refusals():
        check_prompt("prompt", ids, info.vocab_size)
    kept = _truncate(ids, body, info, num_taken)
    if not body.echo:
        return EncodedPrompt(kept)
    decode = partial(codec.decode, skip_special_tokens=body.skip_special_tokens)
    text = prompt if isinstance(prompt, str) and kept is ids else decode(kept)
    starts = token_starts(decode, kept) if body.logprobs is not None else ()
    return EncodedPrompt(kept, text, starts)


def _read(prompt: str | list[int], body: CompletionRequest, codec: TextCodec, info: EngineInfo) -> list[int]:
    if isinstance(prompt, str):
        ids = _read_text(prompt, body, codec, info) if prompt else []
        _check_embedded("prompt", ids, codec, info.vocab_size)
    else:
        ids = prompt
        check_vocabulary("prompt", ids, info.vocab_size)
    if not body.suffix:
        return ids
    ids = codec.fill_in_the_middle(ids, body.suffix)
    _check_embedded("suffix", ids, codec, info.vocab_size)
    return ids


def _read_text(prompt: str, body: CompletionRequest, codec: TextCodec, info: EngineInfo) -> list[int]:
    if body.suffix or body.truncate_prompt_tokens is not None:
        return codec.encode(prompt, add_special_tokens=not body.suffix)
    return encode_text("prompt", prompt, codec, info)


def _truncate(ids: list[int], body: SamplingFields, info: EngineInfo, num_taken: int) -> list[int]:
    """The last `truncate_prompt_tokens` ids; for -1 what the context holds beside the completion."""
    if body.truncate_prompt_tokens is None:
        return ids
    most = info.max_model_len - num_taken - (1 if body.token_limit is None else body.token_limit)
    limit = most if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    return ids if len(ids) <= limit or limit < 1 else ids[-limit:]
