"""POST /v1/completions."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import answer
from server.choices import Generation
from server.formats.completions import CompletionFormat
from server.intake import BodyRoute
from server.openapi import GENERATION
from server.planning import plan_completion
from server.schemas.completions import CompletionRequest, CompletionResponse
from server.sse import unless_disconnected
from server.state import State

router = APIRouter(route_class=BodyRoute, prefix="/v1", tags=["completions"])


@router.post(
    "/completions",
    response_model=CompletionResponse,
    responses=GENERATION,
)
async def create_completion(request: Request, body: CompletionRequest, state: State) -> Response:
    """Continues one or more prompts."""
    body = state.defaults.apply(body)
    info = state.batcher.admit()
    caller = state.caller(request)
    planned = plan_completion(
        body, state.codec, info, state.batcher.max_queued_requests, lanes=state.lanes, caller=caller
    )
    plan = await unless_disconnected(request, planned)
    generation = Generation.start(body, plan, state.codec, state.batcher)
    form = CompletionFormat(body, generation, state.codec)
    return await answer(request, generation, form, state)
