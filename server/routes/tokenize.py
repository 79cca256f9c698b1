"""POST /tokenize and /detokenize."""

import anyio.to_thread
from fastapi import APIRouter, Depends

from server.openapi import JSON_BODY, errors
from server.prompts import check_vocabulary, conversation_ids
from server.schemas.base import RequestModel
from server.schemas.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from server.state import ServerState, State, require_json

router = APIRouter(
    tags=["tokenize"], dependencies=[Depends(require_json)], responses=errors(*JSON_BODY, 500, 503)
)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, state: State) -> TokenizeResponse:
    """The tokens of a text or of a conversation."""
    _check(body, body.model, state)
    info = state.batcher.engine_info()
    ids = await anyio.to_thread.run_sync(_encode, body, state)
    strings = [state.codec.piece(token_id) for token_id in ids] if body.return_token_strs else None
    return TokenizeResponse(count=len(ids), max_model_len=info.max_model_len, tokens=ids, token_strs=strings)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: State) -> DetokenizeResponse:
    """The text of tokens."""
    _check(body, body.model, state)
    state.codec.check_text("tokens")
    check_vocabulary("tokens", body.tokens, state.batcher.engine_info().vocab_size)

    def decode() -> str:
        return state.codec.decode(body.tokens, skip_special_tokens=False)

    return DetokenizeResponse(prompt=await anyio.to_thread.run_sync(decode))


def _check(body: RequestModel, model: str | None, state: ServerState) -> None:
    if model is not None:
        state.check_model(model)
    body.reject_extra_fields(allow_unknown=state.settings.allow_unknown_fields)


def _encode(body: TokenizeRequest, state: ServerState) -> list[int]:
    special = body.add_special_tokens
    if body.messages is None:
        assert body.prompt is not None
        return state.codec.encode(body.prompt, add_special_tokens=special is not False)
    return conversation_ids(
        body.messages, body, state.codec, state.chat_template, add_special_tokens=special is True
    )
