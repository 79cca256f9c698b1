"""The engine: looped models, their loading, and the passes that serve them.

Knows nothing about HTTP. Importing this package imports no torch, so that the API process, which needs
only the message types, stays small; `load_model` and the rest arrive when they are first asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.checkpoint.loader import LoadedModel, load_config, load_model, save_checkpoint

__all__ = ["LoadedModel", "load_config", "load_model", "save_checkpoint"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from model.checkpoint import loader  # noqa: PLC0415, torch is imported here and not before

    attribute: object = getattr(loader, name)
    return attribute
