"""POST /tokenize and /detokenize."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.protocol import EngineInfo
from server.intake import BodyRoute
from server.json_parts import json_bytes
from server.openapi import JSON_BODY, errors
from server.prompts import RenderedChat, check_length, check_vocabulary, encode_rendered, encode_text, render
from server.schemas.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from server.sse import unless_disconnected
from server.state import ServerState, State

router = APIRouter(route_class=BodyRoute, tags=["tokenize"], responses=errors(*JSON_BODY, 500, 503))


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(request: Request, body: TokenizeRequest, state: State) -> Response:
    """The tokens of a text or of a conversation."""
    content = await unless_disconnected(request, _tokens(body, state, state.batcher.engine_info()))
    return Response(content, media_type="application/json")


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest, state: State) -> DetokenizeResponse:
    """The text of tokens."""
    state.codec.check_text("tokens")
    check_vocabulary("tokens", body.tokens, state.batcher.engine_info().vocab_size)
    decode = state.lanes.texts(len(body.tokens)).run(lambda: state.codec.decode_long(body.tokens))
    return DetokenizeResponse(prompt=await unless_disconnected(request, decode))


async def _tokens(body: TokenizeRequest, state: ServerState, info: EngineInfo) -> bytes:
    """The answer's JSON."""
    said = await _text(body, state, info)
    is_conversation = body.messages is not None
    special = not is_conversation if body.add_special_tokens is None else body.add_special_tokens

    def write() -> bytes:
        if is_conversation:
            ids = encode_rendered(said, state.codec, info, add_special_tokens=special)
        else:
            ids = encode_text("prompt", said.text, state.codec, info, add_special_tokens=special)
        strings = [state.codec.piece(token_id) for token_id in ids] if body.return_token_strs else None
        answer = TokenizeResponse.model_construct(
            count=len(ids), max_model_len=info.max_model_len, tokens=ids, token_strs=strings
        )
        return json_bytes(answer)

    return await state.lanes.texts(len(said.text)).run(write)


async def _text(body: TokenizeRequest, state: ServerState, info: EngineInfo) -> RenderedChat:
    """The text to tokenise."""
    if body.messages is None:
        assert body.prompt is not None
        check_length("prompt", body.prompt, state.codec, info)
        return RenderedChat(body.prompt, is_disguised=False)
    messages = body.messages
    return await state.lanes.templates.run(
        lambda: render(messages, body, state.codec, state.chat_template, info)
    )
