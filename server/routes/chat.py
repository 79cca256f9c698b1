"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import answer
from server.choices import Generation
from server.formats.chat import ChatFormat
from server.intake import BodyRoute
from server.openapi import GENERATION
from server.planning import plan_chat
from server.schemas.chat import ChatRequest, ChatResponse
from server.sse import unless_disconnected
from server.state import State

router = APIRouter(route_class=BodyRoute, prefix="/v1", tags=["chat"])


@router.post(
    "/chat/completions",
    response_model=ChatResponse,
    responses=GENERATION,
)
async def create_chat_completion(request: Request, body: ChatRequest, state: State) -> Response:
    """Answers a conversation."""
    state.check_model(body.model)
    body = state.defaults.apply(body)
    info = state.batcher.admit()
    caller = state.caller(request)
    planned = plan_chat(
        body,
        state.codec,
        state.chat_template,
        info,
        state.batcher.max_queued_requests,
        formats=state.formats,
        lanes=state.lanes,
        caller=caller,
    )
    plan = await unless_disconnected(request, planned)
    generation = Generation.start(body, plan, state.codec, state.batcher)
    form = ChatFormat(body, generation, state.codec)
    return await answer(request, generation, form, state)
