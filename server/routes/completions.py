"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.choices import Choice, ChoiceDelta, Generation, make_choices
from server.planning import make_plan
from server.schemas.completions import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    CompletionTokensDetails,
    PromptTokensDetails,
    Usage,
)
from server.schemas.sampling import StreamOptions
from server.sse import ClientDisconnectedError, stream_response, unless_disconnected
from server.state import ServerState, State, require_json

router = APIRouter(prefix="/v1", tags=["completions"])

# Longer than the server's own grace period, after which it ends streams properly.
STREAM_GRACE_MARGIN = 5.0
CLIENT_CLOSED_REQUEST = 499  # nginx's status; nobody receives it, but access logs show it


@router.post("/completions", response_model=CompletionResponse, dependencies=[Depends(require_json)])
async def create_completion(request: Request, body: CompletionRequest, state: State) -> Response:
    """Continues one or more prompts."""
    state.check_model(body.model)
    body.reject_extra_fields(allow_unknown=state.settings.allow_unknown_fields)
    generation = await _start(body, state)
    try:
        if body.stream:
            grace = state.settings.shutdown_timeout + STREAM_GRACE_MARGIN
            return await stream_response(request, _chunks(generation), generation.close, grace)
        response = await unless_disconnected(request, _complete(generation))
    except ClientDisconnectedError:
        generation.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        generation.close()
        raise
    generation.close()
    return Response(_json(response), media_type="application/json")


async def _start(body: CompletionRequest, state: ServerState) -> Generation:
    info = state.batcher.engine_info()
    plan = await make_plan(body, state.codec, info, state.batcher.max_queued_requests)
    choices = make_choices(body, plan, state.codec)
    return Generation(body, plan, choices, state.batcher.open(plan.requests if body.max_tokens else []))


async def _complete(generation: Generation) -> CompletionResponse:
    """The whole answer."""
    deltas: list[list[ChoiceDelta]] = [[] for _ in generation.choices]
    async with aclosing(generation.deltas()) as stream:
        async for delta in stream:
            deltas[delta.choice_index].append(delta)
    choices = [_choice(generation, _join(parts), first=True) for parts in deltas]
    return _response(generation, choices, int(time.time()), usage=_usage(generation))


def _join(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    return deltas[-1]._replace(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
    )


async def _chunks(generation: Generation) -> AsyncGenerator[str, None]:
    """The JSON of a stream's chunks. Deltas without anything to see are left out."""
    body, created = generation.body, int(time.time())
    options = body.stream_options or StreamOptions()
    begun: set[int] = set()
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if not (delta.text or delta.finish_reason or body.return_token_ids):
                continue
            choice = _choice(generation, delta, first=delta.choice_index not in begun)
            begun.add(delta.choice_index)
            if options.continuous_usage_stats:
                yield _json(_response(generation, [choice], created, usage=_usage(generation)))
            elif options.include_usage:
                yield _json(_response(generation, [choice], created, usage=None))
            else:
                yield _json(_response(generation, [choice], created))
    if options.include_usage:
        yield _json(_response(generation, [], created, usage=_usage(generation)))


def _choice(generation: Generation, delta: ChoiceDelta, *, first: bool) -> CompletionChoice:
    choice = CompletionChoice(
        index=delta.choice_index,
        text=delta.text,
        logprobs=None,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
    )
    if generation.body.return_token_ids:
        choice.token_ids = delta.token_ids
        if first:
            choice.prompt_token_ids = generation.choices[delta.choice_index].request.prompt_token_ids
    return choice


def _response(
    generation: Generation, choices: list[CompletionChoice], created: int, **usage: Usage | None
) -> CompletionResponse:
    return CompletionResponse(
        id=generation.plan.id,
        object="text_completion",
        created=created,
        model=generation.body.model,
        choices=choices,
        **usage,
    )


def _json(response: CompletionResponse) -> str:
    return response.model_dump_json(exclude_unset=True)


def _usage(generation: Generation) -> Usage:
    """What the request has cost so far."""
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in generation.plan.prompts)
    num_tokens = sum(choice.num_tokens for choice in generation.choices)
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=_cached_tokens(generation)),
        completion_tokens_details=_prediction_details(generation.choices),
    )


def _cached_tokens(generation: Generation) -> int:
    """A prompt counts once: its first choice decides, the others find what that one left."""
    return sum(choice.stats.cached_prompt_tokens for choice in generation.choices[:: generation.body.n])


def _prediction_details(choices: Iterable[Choice]) -> CompletionTokensDetails:
    return CompletionTokensDetails(
        accepted_prediction_tokens=sum(choice.stats.accepted_drafts for choice in choices),
        rejected_prediction_tokens=sum(choice.stats.rejected_drafts for choice in choices),
    )
