"""From a valid body to the engine's requests: all that must be known before the first token.

Checks what depends on the model, by the engine's own rules (`model.rules`). Invariant: a plan
that was made can be run; every refusal happens here or in `RequestBatcher.open`, before anything is sent.
"""

import secrets
import uuid
from typing import NamedTuple

import msgspec

from model.protocol import EngineInfo, GenerationRequest, RequestOptions, SamplingParams
from model.rules import (
    ContextError,
    TokenIdError,
    check_length,
    check_options,
    check_token_ids,
    num_tokens_before,
)
from server.chat_template import ChatTemplate
from server.errors import ContextLengthError, InvalidRequestError, quote, rules_as_refusals
from server.guides import check_guide, check_now, check_tools, output_of
from server.lanes import Lane, Lanes
from server.limits import MAX_STOP_TOKEN_IDS
from server.output.formats import OutputFormats
from server.output.rules import PLAIN_TEXT, OutputRules
from server.prompts import (
    EncodedPrompt,
    check_lengths,
    encode_completion,
    encode_conversation,
    encode_decoder_prompt,
    render,
)
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.sampling import SamplingFields
from server.tokenizer import TextCodec


class Caller(NamedTuple):
    """Who asks: what tells clients apart in the queue and in the prefix cache, and what they may ask for."""

    tenant: str = ""
    cache_salt: str = ""
    may_set_priority: bool = False
    max_stop_token_ids: int = MAX_STOP_TOKEN_IDS


ANYONE = Caller()


class Plan(NamedTuple):
    """The prompts, and the engine's requests: prompt by prompt its candidates.

    `has_sources`: the prompts are sources, and completions begin texts of their own.
    """

    id: str
    prompts: list[EncodedPrompt]
    requests: list[GenerationRequest]
    output: OutputRules = PLAIN_TEXT
    has_sources: bool = False


async def plan_completion(
    body: CompletionRequest,
    codec: TextCodec,
    info: EngineInfo,
    max_sequences: int,
    *,
    lanes: Lanes,
    caller: Caller = ANYONE,
) -> Plan:
    """Encodes and checks; raises InvalidRequestError."""
    num_sequences = len(body.prompts) * body.num_candidates
    if num_sequences > max_sequences:
        each = "n" if body.best_of is None else "best_of"
        raise InvalidRequestError(
            f"{len(body.prompts)} prompts with {each} = {body.num_candidates} are {num_sequences} "
            f"sequences; one request may have {max_sequences}",
            param="prompt" if len(body.prompts) > max_sequences else each,
        )
    _check_text_fields(body, codec)
    options = _options(body, codec, info, caller)
    _check_asked(body, options, info)
    num_characters = check_lengths(body, codec, info)
    await _check_grammar(body, lanes.grammars)
    lane = lanes.texts(num_characters)
    if body.decoder_prompt is not None:
        beginning = await lane.run(lambda: encode_decoder_prompt(body, codec, info))
        options = msgspec.structs.replace(options, decoder_prompt=beginning)
        with rules_as_refusals():
            check_options(options, info)
    num_taken = num_tokens_before(0, options, info)
    if num_taken >= info.max_model_len:
        raise ContextLengthError(num_taken, None, info.max_model_len, prompt_param="decoder_prompt")
    prompts = await lane.run(lambda: encode_completion(body, codec, info, num_taken))
    return _plan(("cmpl", "prompt"), body, info, prompts, options)


async def plan_chat(
    body: ChatRequest,
    codec: TextCodec,
    template: ChatTemplate | None,
    info: EngineInfo,
    max_sequences: int,
    *,
    formats: OutputFormats,
    lanes: Lanes,
    caller: Caller = ANYONE,
) -> Plan:
    """Renders, encodes and checks; raises InvalidRequestError."""
    if body.n > max_sequences:
        raise InvalidRequestError(f"n is {body.n}; one request may have {max_sequences}", param="n")
    if body.continue_final_message and info.is_encoder_decoder:
        raise InvalidRequestError(
            "continue_final_message: this model reads the messages as a source and writes a text of its own",
            param="continue_final_message",
        )
    codec.check_text("messages")
    options = _options(body, codec, info, caller)
    _check_asked(body, options, info)
    await _check_grammar(body, lanes.grammars)
    said = await lanes.templates.run(lambda: render(body.messages, body, codec, template, info))
    check_tools(body, formats)
    output = output_of(body, formats, opens_thoughts=said.opens_thoughts)
    if output.grammar != options.grammar:
        options = msgspec.structs.replace(options, grammar=output.grammar)
        with rules_as_refusals(grammar=output.grammar_field):
            check_options(options, info)
        await lanes.grammars.run(lambda: check_guide(output))
    encode = lanes.texts(len(said.text)).run(lambda: encode_conversation(said, body, codec, info))
    plan = _plan(("chatcmpl", "messages"), body, info, [await encode], options)
    return plan._replace(output=output.rules)


def _plan(
    names: tuple[str, str],
    body: SamplingFields,
    info: EngineInfo,
    prompts: list[EncodedPrompt],
    options: RequestOptions,
) -> Plan:
    """`names`: how the plan's id begins, and the field that holds the prompt."""
    prefix, prompt_param = names
    lengths = [num_tokens_before(len(prompt.token_ids), options, info) for prompt in prompts]
    limits = [_token_limit(body, length, info, prompt_param) for length in lengths]
    plan_id = f"{prefix}-{uuid.uuid4().hex}"
    requests = _requests(plan_id, body, options, prompts, limits)
    return Plan(plan_id, prompts, requests, has_sources=info.is_encoder_decoder)


def _token_limit(body: SamplingFields, num_prompt_tokens: int, info: EngineInfo, prompt_param: str) -> int:
    """How many tokens may be generated; raises ContextLengthError if they don't fit behind the prompt."""
    asked = None if body.may_be_cut else body.token_limit
    try:
        # Where the client gave no number, there must be room for one token.
        check_length(num_prompt_tokens, 1 if asked is None else asked, info.max_model_len)
    except ContextError:
        raise ContextLengthError(
            num_prompt_tokens, asked, info.max_model_len, prompt_param=prompt_param
        ) from None
    room = info.max_model_len - num_prompt_tokens
    return room if body.token_limit is None else min(room, body.token_limit)


def _requests(
    plan_id: str,
    body: SamplingFields,
    options: RequestOptions,
    prompts: list[EncodedPrompt],
    limits: list[int],
) -> list[GenerationRequest]:
    seed = secrets.randbits(63) if body.seed is None else body.seed
    sampling = [sampling_params(body, choice_seed(seed, i)) for i in range(body.num_candidates)]
    shared = msgspec.structs.asdict(options)
    return [
        GenerationRequest(
            **shared,
            request_id=f"{plan_id}-{p * body.num_candidates + i}",
            prompt_token_ids=prompt.token_ids,
            max_tokens=limit,
            sampling=params,
        )
        for p, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        for i, params in enumerate(sampling)
    ]


def _options(body: SamplingFields, codec: TextCodec, info: EngineInfo, caller: Caller) -> RequestOptions:
    """What all sequences of a request share."""
    if body.priority and not caller.may_set_priority:
        raise InvalidRequestError(
            f"priority is {body.priority}, but the server was started without --allow-priority",
            param="priority",
        )
    if len(body.stop_token_ids) > caller.max_stop_token_ids:
        raise InvalidRequestError(
            f"stop_token_ids must have at most {caller.max_stop_token_ids} entries, "
            f"not {len(body.stop_token_ids)}",
            param="stop_token_ids",
        )
    special_stops = [i for i in codec.special_stops(body.stop_strings) if i < info.vocab_size]
    ranked = body.num_candidates > body.n  # by the log-probabilities of their tokens
    return RequestOptions(
        stop_token_ids=[*body.stop_token_ids, *special_stops],
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        speculation=body.speculation,
        num_loops=body.num_loops,
        init_scale=body.init_scale,
        priority=body.priority,
        logprobs=0 if ranked and body.num_logprobs is None else body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
        grammar=body.grammar,
        cache_salt="\n".join(filter(None, [caller.cache_salt, body.cache_salt])),
        draft_policy=body.draft_policy,
        tenant=caller.tenant,
        include_wave=body.includes_wave,
        loop_logprobs=body.loop_logprobs,
        exit_threshold=body.exit_threshold,
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a prompt's i-th choice: seed + i, wrapped to a signed 64-bit integer.

    Choice 0 of a request is therefore what the same request with n = 1 gives, and a prompt's choices
    don't depend on the prompts beside it.
    """
    return (seed + choice + 2**63) % 2**64 - 2**63


def sampling_params(fields: SamplingFields, seed: int) -> SamplingParams:
    """The sampling fields in the engine's terms. A `top_p` of 0 leaves the likeliest token alone."""
    greedy = fields.top_p == 0
    return SamplingParams(
        temperature=0.0 if greedy else fields.temperature,
        top_k=max(fields.top_k, 0),
        top_p=1.0 if greedy else fields.top_p,
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias={int(token_id): bias for token_id, bias in fields.logit_bias.items()},
        seed=seed,
    )


def _check_asked(fields: SamplingFields, options: RequestOptions, info: EngineInfo) -> None:
    """Raises InvalidRequestError for what the model doesn't have, before any prompt is tokenised."""
    if (fields.truncate_prompt_tokens or 0) > info.max_model_len:
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {fields.truncate_prompt_tokens}, "
            f"but the model's context is {info.max_model_len} tokens",
            param="truncate_prompt_tokens",
        )
    if fields.echoes and info.is_encoder_decoder:
        raise InvalidRequestError(
            "echo: the prompt of this model is the source of another text, not its beginning; "
            "what the text begins with is decoder_prompt",
            param="echo",
        )
    scored = "logprobs" if fields.prompt_logprobs is None else "prompt_logprobs"
    with rules_as_refusals(grammar=fields.format_field, prompt_logprobs=scored):
        check_options(options, info)
        for key in fields.logit_bias:
            if not _is_number(key):
                raise TokenIdError("logit_bias", quote(key), info.vocab_size)
        check_token_ids("logit_bias", [*map(int, fields.logit_bias)], info.vocab_size)


def _is_number(key: str) -> bool:
    # The length first: int() of a very long string of digits raises.
    return len(key) < 20 and key.isascii() and key.isdigit()


def _check_text_fields(body: CompletionRequest, codec: TextCodec) -> None:
    """Raises NoTokenizerError for a field that means text where the model has no tokenizer."""
    for field, is_given in {
        "prompt": any(isinstance(prompt, str) for prompt in body.prompts),
        "suffix": body.suffix,
        "echo": body.echo,
        "decoder_prompt": isinstance(body.decoder_prompt, str),
        "stop": body.stop_strings,
        body.format_field or "response_format": body.format_field,
    }.items():
        if is_given:
            codec.check_text(field)


async def _check_grammar(fields: SamplingFields, lane: Lane) -> None:
    """Raises InvalidRequestError for a grammar that no engine could follow."""
    param = fields.format_field
    if param is not None:
        await lane.run(lambda: check_now(fields.grammar, param))
