"""From a running generation to an HTTP answer, whole or streamed, whatever its format.

Invariant: a generation is closed however its answer ends.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from server.choices import ChoiceDelta, Generation, join_deltas
from server.json_parts import json_bytes
from server.lanes import Lane
from server.schemas.sampling import StreamOptions
from server.schemas.usage import CompletionTokensDetails, PromptTokensDetails, Usage
from server.sse import (
    CLIENT_CLOSED_REQUEST,
    ClientDisconnectedError,
    Frame,
    StreamStyle,
    stream_response,
    unless_disconnected,
)
from server.state import ServerState

SHORT_ANSWER = 1000  # tokens, the likeliest ones beside each included, that are written in a few ms
# Longer than the server's own grace period, after which it ends streams properly.
STREAM_GRACE_MARGIN = 5.0

Part = TypeVar("Part")


class Stream(NamedTuple):
    """A stream that may be sent: its frames, and what is sent beside them."""

    items: AsyncGenerator[Frame, None]
    style: StreamStyle


class WholeFormat(Protocol):
    """How an endpoint writes an answer that isn't streamed."""

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> BaseModel:
        """The answer; `choices` are those to return, in order."""


class Format(WholeFormat, Protocol[Part]):
    """How an endpoint writes choices."""

    def parts(self, delta: ChoiceDelta, *, first: bool) -> list[Part]:
        """What each chunk for a delta adds to its choice; `first`: nothing was sent of it yet."""

    def nothing(self) -> Part:
        """What a chunk adds that is sent only to be sent."""

    def chunk(self, parts: list[Part], **usage: Usage | None) -> BaseModel:
        """A chunk of a stream; without `usage` the chunk has no such field."""


async def answer(
    request: Request, generation: Generation, form: Format[Part], state: ServerState
) -> Response:
    """The whole answer or the beginning of a stream of chunks; takes over the generation."""
    chunks = _chunks(generation, form, state.lanes.answers)
    style = StreamStyle(filler=partial(_filler, generation, form))
    return await respond(request, generation, form, state, Stream(chunks, style))


async def respond(
    request: Request, generation: Generation, form: WholeFormat, state: ServerState, stream: Stream
) -> Response:
    """The whole answer, or the beginning of `stream`; takes over the generation.

    What is long, such as an echo with log-probabilities, is written in a lane of its own.
    """
    lane, settings = state.lanes.answers, state.settings
    try:
        if generation.fields.stream:
            return await stream_response(
                request,
                stream.items,
                generation.close,
                stream.style,
                shutdown_grace_period=settings.shutdown_timeout + STREAM_GRACE_MARGIN,
                ping_seconds=settings.ping_interval,
            )
        content = await unless_disconnected(request, _whole(generation, form, lane))
    except ClientDisconnectedError:
        generation.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        generation.close()
        raise
    generation.close()
    return Response(content, media_type="application/json")


async def _whole(generation: Generation, form: WholeFormat, lane: Lane) -> str | bytes:
    """The JSON of the answer."""
    deltas: list[list[ChoiceDelta]] = [[] for _ in generation.choices]
    async with aclosing(generation.deltas()) as stream:
        async for delta in stream:
            deltas[delta.choice_index].append(delta)
    best = [join_deltas(deltas[choice.index]) for choice in generation.best()]
    usage = usage_of(generation)
    if is_short(best, generation, _num_prompt_scores(generation)):
        return _json(form.whole(best, usage))
    return await lane.run(lambda: json_bytes(form.whole(best, usage)))


def is_short(deltas: Sequence[ChoiceDelta], generation: Generation, num_others: int = 0) -> bool:
    """Whether writing the deltas, and so many tokens beside them, takes but a few milliseconds."""
    num_entries = sum(len(delta.echoed) + len(delta.tokens) for delta in deltas)
    # How many tokens, with their texts, are written for each token.
    size = 1 if generation.fields.num_logprobs is None else 2 + generation.fields.num_logprobs
    num_loops = sum(len(token.loops) for delta in deltas for token in delta.tokens)
    num_of_loops = num_loops * (2 + (generation.fields.loop_logprobs or 0))
    return num_entries * size + num_of_loops + num_others <= SHORT_ANSWER


def _num_prompt_scores(generation: Generation) -> int:
    """How many tokens are written for the prompts' own, beside those that are echoed."""
    most = generation.fields.prompt_logprobs
    if most is None:
        return 0
    return sum(len(choice.prompt_scores or ()) for choice in generation.choices) * (2 + most)


async def _chunks(generation: Generation, form: Format[Part], lane: Lane) -> AsyncGenerator[Frame, None]:
    """The JSON of a stream's chunks. Deltas without anything to see are left out."""
    fields = generation.fields
    options = fields.stream_options or StreamOptions()
    shows_tokens = (
        fields.return_token_ids or fields.num_logprobs is not None or fields.loop_logprobs is not None
    )
    begun: set[int] = set()
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if not (delta.has_news or (shows_tokens and delta.tokens)):
                continue
            first = delta.choice_index not in begun
            begun.add(delta.choice_index)
            usage = _usage_of_chunk(generation, options)
            if is_short([delta], generation):
                chunks = [_json(form.chunk([part], **usage)) for part in form.parts(delta, first=first)]
            else:
                chunks = await lane.run(partial(_write_chunks, form, delta, usage, first=first))
            for chunk in chunks:
                yield chunk
    if options.include_usage:
        yield _json(form.chunk([], usage=usage_of(generation)))


def _filler(generation: Generation, form: Format[Part]) -> str:
    """The JSON of a chunk that says nothing."""
    options = generation.fields.stream_options or StreamOptions()
    return _json(form.chunk([form.nothing()], **_usage_of_chunk(generation, options)))


def _usage_of_chunk(generation: Generation, options: StreamOptions) -> dict[str, Usage | None]:
    if options.continuous_usage_stats:
        return {"usage": usage_of(generation)}
    return {"usage": None} if options.include_usage else {}


def _write_chunks(
    form: Format[Part], delta: ChoiceDelta, usage: dict[str, Usage | None], *, first: bool
) -> list[str]:
    return [json_bytes(form.chunk([part], **usage)).decode() for part in form.parts(delta, first=first)]


def _json(response: BaseModel) -> str:
    return response.model_dump_json(exclude_unset=True)


def usage_of(generation: Generation) -> Usage:
    """What the request has cost so far, candidates that were dropped included."""
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in generation.plan.prompts)
    num_tokens = sum(choice.num_tokens for choice in generation.choices)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=_cached_tokens(generation)),
        completion_tokens_details=_completion_details(generation),
    )


def _cached_tokens(generation: Generation) -> int:
    """A prompt counts once: its first choice decides, the others find what that one left."""
    firsts = generation.choices[:: generation.fields.num_candidates]
    return sum(choice.stats.cached_prompt_tokens for choice in firsts)


def _completion_details(generation: Generation) -> CompletionTokensDetails:
    choices = generation.choices
    details = CompletionTokensDetails(
        accepted_prediction_tokens=sum(choice.stats.accepted_drafts for choice in choices),
        rejected_prediction_tokens=sum(choice.stats.rejected_drafts for choice in choices),
        decode_passes=sum(choice.stats.passes for choice in choices),
    )
    if generation.plan.output.finds_thoughts:
        details.reasoning_tokens = sum(choice.num_reasoning_tokens for choice in choices)
    return details
