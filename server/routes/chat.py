"""POST /v1/chat/completions."""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.answers import answer
from server.choices import Generation
from server.formats.chat import ChatFormat
from server.openapi import GENERATION
from server.planning import plan_chat
from server.schemas.chat import ChatRequest, ChatResponse
from server.state import State, require_json

router = APIRouter(prefix="/v1", tags=["chat"])


@router.post(
    "/chat/completions",
    response_model=ChatResponse,
    responses=GENERATION,
    dependencies=[Depends(require_json)],
)
async def create_chat_completion(request: Request, body: ChatRequest, state: State) -> Response:
    """Answers a conversation."""
    state.check_model(body.model)
    body.reject_extra_fields(allow_unknown=state.settings.allow_unknown_fields)
    body = state.defaults.apply(body)
    info = state.batcher.admit()
    plan = await plan_chat(body, state.codec, state.chat_template, info, state.batcher.max_queued_requests)
    generation = Generation.start(body, plan, state.codec, state.batcher)
    form = ChatFormat(body, generation, state.codec)
    return await answer(request, generation, form, state.settings.shutdown_timeout)
