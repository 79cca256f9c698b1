"""Where the golden vectors lie, and which of them are of families that are served."""

import json
from pathlib import Path

import torch

from model import load_config
from model.checkpoint.families import family_of
from model.checkpoint.files import stored_tensors
from model.network.config import ConfigError
from model.passes.native.library import NativeUnavailableError
from model.passes.native.weights import check_covered

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
NEXT = GOLDEN.with_name("golden-next")


def is_served(folder: Path) -> bool:
    """Whether the folder's family is one of those that can be loaded."""
    try:
        family_of(json.loads((folder / "config.json").read_text()), stored_tensors(folder))
    except ConfigError:
        return False
    return True


def is_covered(folder: Path) -> bool:
    """Whether the native library runs the folder's model."""
    try:
        check_covered(load_config(folder), torch.device("cpu"))
    except NativeUnavailableError:
        return False
    return True


def golden_folders() -> list[Path]:
    """Every folder of `GOLDEN`, and those of `NEXT` whose family is served by now."""
    found = [folder for folder in GOLDEN.glob("*") if folder.is_dir()]
    return sorted(found + [folder for folder in NEXT.glob("*") if folder.is_dir() and is_served(folder)])
