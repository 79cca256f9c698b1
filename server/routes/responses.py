"""POST /v1/responses, stateless."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.event_answers import answer_events
from server.formats.responses import ResponsesFormat
from server.gateways.responses import responses_to_chat
from server.gateways.translation import translate
from server.intake import BodyRoute
from server.openapi import RESPONSES
from server.routes.chat import start_chat
from server.schemas.responses import ResponseObject, ResponsesRequest
from server.state import State

router = APIRouter(route_class=BodyRoute, prefix="/v1", tags=["responses"])


@router.post("/responses", response_model=ResponseObject, responses=RESPONSES)
async def create_response(request: Request, body: ResponsesRequest, state: State) -> Response:
    """Answers a conversation that is sent whole. Nothing is kept."""
    asked = await translate(lambda: responses_to_chat(body), len(body.items), state.lanes.bodies)
    with asked.names.told():
        generation = await start_chat(request, asked.chat, state)
    form = ResponsesFormat(body, generation, state.codec)
    return await answer_events(request, generation, form, state, asked.skipped)
