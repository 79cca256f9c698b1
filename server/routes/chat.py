"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import answer
from server.choices import Generation
from server.formats.chat import ChatFormat
from server.intake import BodyRoute
from server.openapi import GENERATION
from server.planning import plan_chat
from server.prompts import EncodedPrompt, encode_conversation, render
from server.schemas.chat import ChatRequest, ChatResponse
from server.sse import unless_disconnected
from server.state import ServerState, State

router = APIRouter(route_class=BodyRoute, prefix="/v1", tags=["chat"])


@router.post(
    "/chat/completions",
    response_model=ChatResponse,
    responses=GENERATION,
)
async def create_chat_completion(request: Request, body: ChatRequest, state: State) -> Response:
    """Answers a conversation."""
    generation = await start_chat(request, body, state)
    form = ChatFormat(body, generation, state.codec)
    return await answer(request, generation, form, state)


async def start_chat(request: Request, body: ChatRequest, state: ServerState) -> Generation:
    """Plans and submits a conversation, whichever API it came by. Who calls must close the generation."""
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
    return Generation.start(body, plan, state.codec, state.batcher)


async def encode_chat(body: ChatRequest, state: ServerState) -> EncodedPrompt:
    """The prompt of a conversation, without a thought for what is generated behind it."""
    info, codec = state.batcher.engine_info(), state.codec
    codec.check_text("messages")
    said = await state.lanes.templates.run(
        lambda: render(body.messages, body, codec, state.chat_template, info)
    )
    lane = state.lanes.texts(len(said.text))
    return await lane.run(lambda: encode_conversation(said, body, codec, info))
