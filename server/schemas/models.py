"""Bodies of /v1/models."""

from typing import Literal

from pydantic import BaseModel, Field

# Failed: it could not be loaded, or its engine was given up; a later request tries again.
ModelStatus = Literal["unloaded", "loading", "ready", "failed"]


class ModelCard(BaseModel):
    """One name under which the model is served. What the engine knows of it is absent until it is loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["speed"] = "speed"
    supports_chat: bool
    state: ModelStatus | None = Field(
        None,
        description="where models are loaded when a request names them: unloaded, loading, ready or failed",
    )
    max_model_len: int | None = None
    num_loops: int | None = None
    max_loops: int | None = None
    draft_depths: list[int] | None = None
    draft_policy: str | None = None


class ModelList(BaseModel):
    """All names of all models, of each the main one first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
