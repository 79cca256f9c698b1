"""From a valid `CompletionRequest` to the engine's requests: all that must be known before the first token.

Checks what depends on the model: vocabulary, context length, number of loops. Invariant: a plan that
was made can be run; every refusal happens here or in `RequestBatcher.open`, before anything is sent.
"""

import secrets
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import anyio.to_thread

from model.protocol import EngineInfo, GenerationRequest, SamplingParams
from server.errors import ContextLengthError, InvalidRequestError, quote
from server.schemas.completions import CompletionRequest
from server.schemas.sampling import SamplingFields
from server.tokenizer import TextCodec


class EncodedPrompt(NamedTuple):
    """A prompt as the model reads it and as a client that asks for an echo sees it."""

    token_ids: list[int]
    text: str


class Plan(NamedTuple):
    """The prompts, and the engine's requests in the order of the choices."""

    id: str
    prompts: list[EncodedPrompt]
    requests: list[GenerationRequest]


async def make_plan(body: CompletionRequest, codec: TextCodec, info: EngineInfo, max_sequences: int) -> Plan:
    """Encodes and checks; raises InvalidRequestError."""
    num_sequences = len(body.prompts) * body.n
    if num_sequences > max_sequences:
        raise InvalidRequestError(
            f"{len(body.prompts)} prompts with n = {body.n} are {num_sequences} sequences; "
            f"one request may have {max_sequences}",
            param="prompt" if len(body.prompts) > max_sequences else "n",
        )
    check_against_model(body, info)
    # A long prompt takes a while: not in the event loop.
    prompts = await anyio.to_thread.run_sync(_encode_prompts, body, codec, info)
    for prompt in prompts:
        if len(prompt.token_ids) + body.max_tokens > info.max_model_len:
            raise ContextLengthError(len(prompt.token_ids), body.max_tokens, info.max_model_len)
    return _plan(body, prompts)


def _plan(body: CompletionRequest, prompts: list[EncodedPrompt]) -> Plan:
    plan_id = f"cmpl-{uuid.uuid4().hex}"
    seed = secrets.randbits(63) if body.seed is None else body.seed
    sampling = [sampling_params(body, choice_seed(seed, i)) for i in range(body.n)]
    requests = [
        _generation_request(body, f"{plan_id}-{index}", prompts[index // body.n], sampling[index % body.n])
        for index in range(len(prompts) * body.n)
    ]
    return Plan(plan_id, prompts, requests)


def _generation_request(
    body: CompletionRequest, request_id: str, prompt: EncodedPrompt, sampling: SamplingParams
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt.token_ids,
        max_tokens=body.max_tokens,
        sampling=sampling,
        stop_token_ids=body.stop_token_ids,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        speculation=body.speculation,
        num_loops=body.num_loops,
        priority=body.priority,
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a prompt's i-th choice: seed + i, wrapped to a signed 64-bit integer.

    Choice 0 of a request is therefore what the same request with n = 1 gives, and a prompt's choices
    don't depend on the prompts beside it.
    """
    return (seed + choice + 2**63) % 2**64 - 2**63


def sampling_params(fields: SamplingFields, seed: int) -> SamplingParams:
    """The sampling fields in the engine's terms."""
    return SamplingParams(
        temperature=fields.temperature,
        top_k=max(fields.top_k, 0),
        top_p=fields.top_p,
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias={int(token_id): bias for token_id, bias in fields.logit_bias.items()},
        seed=seed,
    )


def check_against_model(fields: SamplingFields, info: EngineInfo) -> None:
    """Raises InvalidRequestError for a loop or token that the model doesn't have."""
    if fields.num_loops is not None and fields.num_loops > info.num_loops:
        raise InvalidRequestError(
            f"num_loops is {fields.num_loops}, but the model has {info.num_loops} loops", param="num_loops"
        )
    for key in fields.logit_bias:
        if not _is_token_id(key, info.vocab_size):
            raise InvalidRequestError(
                f"logit_bias: {quote(key)} is no token id; ids are 0 to {info.vocab_size - 1}",
                param="logit_bias",
            )
    _check_vocabulary("stop_token_ids", fields.stop_token_ids, info.vocab_size)


def _is_token_id(key: str, vocab_size: int) -> bool:
    # The length first: int() of a very long string of digits raises.
    return key.isascii() and key.isdigit() and len(key) < 20 and int(key) < vocab_size


def _check_vocabulary(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequestError(
            f"{param}: {largest} is no token id; ids are 0 to {vocab_size - 1}", param=param
        )


def _encode_prompts(body: CompletionRequest, codec: TextCodec, info: EngineInfo) -> list[EncodedPrompt]:
    if not body.prompts:
        raise InvalidRequestError("prompt is empty", param="prompt")
    return [_encode_prompt(prompt, body, codec, info) for prompt in body.prompts]


def _encode_prompt(
    prompt: str | list[int], body: CompletionRequest, codec: TextCodec, info: EngineInfo
) -> EncodedPrompt:
    if not prompt:
        raise InvalidRequestError("prompt is empty: the model needs at least one token", param="prompt")
    if isinstance(prompt, str):
        return EncodedPrompt(codec.encode(prompt), prompt)
    _check_vocabulary("prompt", prompt, info.vocab_size)
    text = codec.decode(prompt, skip_special_tokens=body.skip_special_tokens) if body.echo else ""
    return EncodedPrompt(prompt, text)
