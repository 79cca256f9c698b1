"""Bodies of /v1/models."""

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """One name under which the model is served. What the engine knows of it is absent until it is loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["speed"] = "speed"
    supports_chat: bool
    max_model_len: int | None = None
    num_loops: int | None = None
    max_loops: int | None = None
    draft_depths: list[int] | None = None
    draft_policy: str | None = None


class ModelList(BaseModel):
    """All names, the main one first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
