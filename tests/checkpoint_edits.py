"""Spoils checkpoints on disk, to see what a loader says."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replaces tensors of a folder's single file; None takes one away."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    """Sets keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
