"""POST /v1/completions."""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.answers import answer
from server.choices import Generation
from server.formats.completions import CompletionFormat
from server.openapi import GENERATION
from server.planning import plan_completion
from server.schemas.completions import CompletionRequest, CompletionResponse
from server.state import State, require_json

router = APIRouter(prefix="/v1", tags=["completions"])


@router.post(
    "/completions",
    response_model=CompletionResponse,
    responses=GENERATION,
    dependencies=[Depends(require_json)],
)
async def create_completion(request: Request, body: CompletionRequest, state: State) -> Response:
    """Continues one or more prompts."""
    state.check_model(body.model)
    body.reject_extra_fields(allow_unknown=state.settings.allow_unknown_fields)
    body = state.defaults.apply(body)
    info = state.batcher.admit()
    plan = await plan_completion(body, state.codec, info, state.batcher.max_queued_requests)
    generation = Generation.start(body, plan, state.codec, state.batcher)
    form = CompletionFormat(body, generation, state.codec)
    return await answer(request, generation, form, state.settings.shutdown_timeout)
