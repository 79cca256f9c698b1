"""A training state on disk, in parts that a slow or narrow transfer can carry one by one.

Knows nothing about what the state holds. Invariant: a reader sees the newest state that was written
whole, and never a mixture of two: the manifest is replaced last, in one move, and names its parts with
their digests.
"""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch

MANIFEST = "checkpoint.json"
PART_BYTES = 15_000_000


class DamagedCheckpointError(ValueError):
    """A checkpoint whose parts are missing or not those that its manifest names."""


def save_checkpoint(state: dict[str, Any], folder: Path, part_bytes: int = PART_BYTES) -> None:
    """Writes `state` as parts of at most `part_bytes` and removes the one that was there."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    new = folder / f"checkpoint-{hashlib.sha256(data).hexdigest()[:12]}"
    new.mkdir(exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, len(data), part_bytes)):
        part, name = data[start : start + part_bytes], f"part-{number:03d}"
        (new / name).write_bytes(part)
        parts.append({"name": name, "sha256": hashlib.sha256(part).hexdigest()})
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps({"folder": new.name, "parts": parts}, indent=1))
    partial.replace(folder / MANIFEST)
    for old in folder.glob("checkpoint-*"):
        if old != new:
            shutil.rmtree(old)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state in `folder`, on the CPU, or None if there is none; raises DamagedCheckpointError."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = json.loads((folder / MANIFEST).read_text())
    buffer = io.BytesIO()
    for part in manifest["parts"]:
        path = folder / manifest["folder"] / part["name"]
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise DamagedCheckpointError(f"{path} is missing or is not what {MANIFEST} names")
        buffer.write(data)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, map_location="cpu", weights_only=True)
    return state
