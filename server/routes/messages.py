"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.event_answers import answer_events
from server.formats.messages import MessagesFormat
from server.gateways.messages import in_anthropics_words, messages_to_chat
from server.gateways.translation import translate
from server.intake import BodyRoute
from server.openapi import ANTHROPIC_GENERATION, JSON_BODY, anthropic_errors
from server.routes.chat import encode_chat, start_chat
from server.schemas.messages import CountTokensRequest, MessageObject, MessagesRequest, TokenCount
from server.sse import unless_disconnected
from server.state import State

router = APIRouter(route_class=BodyRoute, prefix="/v1", tags=["messages"])


@router.post("/messages", response_model=MessageObject, responses=ANTHROPIC_GENERATION)
async def create_message(request: Request, body: MessagesRequest, state: State) -> Response:
    """Answers a conversation."""
    asked = await translate(lambda: messages_to_chat(body), len(body.messages), state.lanes.bodies)
    with in_anthropics_words(), asked.names.told():
        generation = await start_chat(request, asked.chat, state)
    form = MessagesFormat(body, generation, request.scope["request_id"])
    return await answer_events(request, generation, form, state, asked.skipped)


@router.post("/messages/count_tokens", responses=anthropic_errors(*JSON_BODY, 500, 503))
async def count_tokens(request: Request, body: CountTokensRequest, state: State) -> TokenCount:
    """How many tokens a conversation has as a prompt."""
    asked = await translate(lambda: messages_to_chat(body), len(body.messages), state.lanes.bodies)
    with in_anthropics_words(), asked.names.told():
        prompt = await unless_disconnected(request, encode_chat(asked.chat, state))
    return TokenCount(input_tokens=len(prompt.token_ids))
