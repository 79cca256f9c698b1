"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter

from server.errors import UnavailableError
from server.openapi import errors
from server.schemas.models import ModelCard, ModelList
from server.state import ServerState, State

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", response_model_exclude_none=True)
async def list_models(state: State) -> ModelList:
    """All names of the model."""
    return ModelList(data=[_card(name, state) for name in state.settings.model_names])


@router.get("/models/{name:path}", response_model_exclude_none=True, responses=errors(404))
async def get_model(name: str, state: State) -> ModelCard:
    """One name; names may contain slashes."""
    state.check_model(name)
    return _card(name, state)


def _card(name: str, state: ServerState) -> ModelCard:
    card = ModelCard(id=name, created=state.created, supports_chat=state.chat_template is not None)
    try:
        info = state.batcher.engine_info()
    except UnavailableError:
        return card
    return card.model_copy(
        update={
            "max_model_len": info.max_model_len,
            "num_loops": info.num_loops,
            "max_loops": info.most_loops if info.most_loops > info.num_loops else None,
            "draft_depths": info.draft_depths,
            "draft_policy": info.draft_policy,
        }
    )
