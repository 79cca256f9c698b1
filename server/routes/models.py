"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter

from server.models import AllModels, Models
from server.openapi import errors
from server.schemas.models import ModelCard, ModelList
from server.served import ServedModel

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", response_model_exclude_none=True)
async def list_models(models: AllModels) -> ModelList:
    """All names of all models."""
    return ModelList(data=[_card(name, model, models) for model in models for name in model.names])


@router.get("/models/{name:path}", response_model_exclude_none=True, responses=errors(404))
async def get_model(name: str, models: AllModels) -> ModelCard:
    """One name; names may contain slashes."""
    return _card(name, models.find(name), models)


def _card(name: str, model: ServedModel, models: Models) -> ModelCard:
    card = ModelCard(
        id=name,
        created=models.created,
        supports_chat=model.source.chat_template is not None,
        state=model.status if models.load_on_demand else None,
    )
    info = model.info
    if info is None:
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
