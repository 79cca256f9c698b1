"""A folder of safetensors files: which tensor lies in which file, and reading them piece by piece.

Knows nothing about models. Invariant: nothing is unpickled, and a damaged or incomplete folder is one
CheckpointError that names the file.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint.hub import INDEX_FILE, SINGLE_FILE, LfsPointerError, read_file, refuse_lfs_pointer

# Pages of a mapped file count as the process's memory until it is unmapped, so a file is opened anew
# after so many bytes, in the middle of a large tensor too: loading then needs the weights and this, not
# the weights twice.
BYTES_PER_MAPPING = 64 * 2**20

# What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and everything that is wrong."""


class StoredTensor(NamedTuple):
    """A tensor on disk: its file, shape, dtype as safetensors spells it (F32, BF16, ...), and name there."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    name_in_file: str

    @property
    def num_bytes(self) -> int:
        """Its size on disk, taking 4 bytes for a number of unknown size."""
        return {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}.get(self.dtype, 4) * math.prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError when it is missing or not one."""
    try:
        content = json.loads(read_file(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except LfsPointerError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by name, from the headers of its files; raises CheckpointError.

    A name is that of the plain module: what torch.compile and its like add to it is left out.
    """
    if (folder / SINGLE_FILE).exists():
        return _header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(_no_weights(folder))
    tensors: dict[str, StoredTensor] = {}
    weight_map = _weight_map(folder / INDEX_FILE)
    for name in sorted(set(weight_map.values())):
        header = _header(folder / name)
        if twice := sorted(tensors.keys() & header.keys()):
            raise CheckpointError(f"{folder / name} holds tensors that another shard has too: {twice}")
        tensors |= header
    if absent := sorted(n for n, file in weight_map.items() if _file_of(tensors, _plain_name(n)) != file):
        raise CheckpointError(f"{folder / INDEX_FILE} names tensors that its shards do not hold: {absent}")
    return tensors


class Piece(NamedTuple):
    """Rows of a stored tensor from `start` on (all of it, if it has no dimensions)."""

    name: str
    start: int
    rows: Tensor


def read_tensors(tensors: dict[str, StoredTensor]) -> Iterator[Piece]:
    """The given tensors piece by piece, each mapped from its file and valid until the next one.

    Raises CheckpointError for a file that cannot be read.
    """
    for file in sorted({tensor.file for tensor in tensors.values()}):
        for group in _groups({n: t for n, t in tensors.items() if t.file == file}):
            yield from _read_mapped(file, group, tensors)


def _read_mapped(
    file: Path, group: list[tuple[str, int, int | None]], tensors: dict[str, StoredTensor]
) -> Iterator[Piece]:
    try:
        with safe_open(file, framework="pt", device="cpu") as mapped:
            for name, start, stop in group:
                whole, there = stop is None, tensors[name].name_in_file
                rows = mapped.get_tensor(there) if whole else mapped.get_slice(there)[start:stop]
                yield Piece(name, start, rows)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _groups(tensors: dict[str, StoredTensor]) -> Iterator[list[tuple[str, int, int | None]]]:
    """(name, first row, row behind the last or None for all) in groups of at most BYTES_PER_MAPPING."""
    group: list[tuple[str, int, int | None]] = []
    size = 0
    for name, tensor in tensors.items():
        for start, stop, num_bytes in _spans(tensor):
            if group and size + num_bytes > BYTES_PER_MAPPING:
                yield group
                group, size = [], 0
            group.append((name, start, stop))
            size += num_bytes
    yield group


def _spans(tensor: StoredTensor) -> Iterator[tuple[int, int | None, int]]:
    """First row, row behind the last, and bytes: all rows at once (None) unless they are too many."""
    if tensor.num_bytes <= BYTES_PER_MAPPING or not tensor.shape:
        yield 0, None, tensor.num_bytes
        return
    num_rows = tensor.shape[0]
    step = max(1, BYTES_PER_MAPPING * num_rows // tensor.num_bytes)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield start, stop, tensor.num_bytes * (stop - start) // num_rows


def _header(file: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    try:
        refuse_lfs_pointer(file)
        with safe_open(file, framework="pt", device="cpu") as mapped:
            for name in mapped.keys():  # noqa: SIM118, not a dict
                header, plain = mapped.get_slice(name), _plain_name(name)
                if plain in tensors:
                    raise CheckpointError(f"{file} holds {tensors[plain].name_in_file} and {name}")
                tensors[plain] = StoredTensor(file, tuple(header.get_shape()), header.get_dtype(), name)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except LfsPointerError as error:
        raise CheckpointError(str(error)) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error
    return tensors


def _plain_name(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is not the name of a file in the same folder")
    return weight_map


def _file_of(tensors: dict[str, StoredTensor], name: str) -> str | None:
    return tensors[name].file.name if name in tensors else None


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    wanted = f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    if pickles:
        return f"{wanted}; {pickles[0]} is a pickle, which can run code and is never loaded: convert it first"
    return wanted
