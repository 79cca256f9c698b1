"""From a checkpoint folder to a model ready to run, and back.

Knows the families only through their tables. Invariant: a model is returned whole or not at all; every
parameter is filled by exactly the tensors that its family's table names, and every tensor on disk is
accounted for.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import CheckpointError, StoredTensor, read_json, read_tensors, stored_tensors
from model.config import LoopedConfig
from model.ending import ending_tokens
from model.families import Family, Place, families_of, family_of, nanbeige
from model.hub import SINGLE_FILE
from model.looped import LoopedTransformer

__all__ = ["CheckpointError", "LoadedModel", "load_config", "load_model", "load_skeleton", "save_checkpoint"]

CONFIG_FILE = "config.json"
HEAD = "head.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS_BETWEEN_LINES = 5.0  # of progress, in a log
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its config, and the slow obvious forward pass over whole texts."""

    model: LoopedTransformer
    config: LoopedConfig

    def logits(
        self,
        input_ids: Sequence[int],
        num_loops: int | None = None,
        initial_state: Tensor | NDArray[np.float32] | None = None,
    ) -> Tensor:
        """Logits (tokens, vocab) in fp32 after `num_loops` loops (1..R; None is R), without a cache.

        `initial_state` (at least tokens, hidden) replaces the zeros, or the input, that a model with
        input injection starts from. Raises ValueError, with the limits, for anything out of range.
        """
        loops = self.config.num_loops if num_loops is None else num_loops
        given = None if initial_state is None else torch.as_tensor(initial_state)
        self._check(input_ids, loops, given)
        ids = torch.tensor([list(input_ids)], device=self.model.device)
        if given is not None:
            given = given[: len(input_ids)].to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            state = self.model.depths(ids, loops, given)[-1]
            return self.model.whole_readout(state)[0].float()

    def gate_logits(self, input_ids: Sequence[int]) -> Tensor:
        """The exit gate before its sigmoid, (R, tokens) in fp32; ValueError for a model without one."""
        if not self.config.exit_gate:
            raise ValueError(f"a {self.config.family} model has no exit gate")
        self._check(input_ids, self.config.num_loops, None)
        with torch.inference_mode():
            states = self.model.depths(torch.tensor([list(input_ids)], device=self.model.device))
            logits: Tensor = self.model.gate(torch.cat(states))
            return logits.squeeze(-1).float()

    def _check(self, input_ids: Sequence[int], num_loops: int, initial_state: Tensor | None) -> None:
        config, size = self.config, len(input_ids)
        if not 1 <= size <= config.max_positions:
            raise ValueError(f"{size} tokens given; 1 to {config.max_positions} are possible")
        for token in input_ids:
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"token id {token} is not in the vocabulary, 0 to {config.vocab_size - 1}")
        if not 1 <= num_loops <= config.num_loops:
            raise ValueError(f"num_loops is {num_loops}; this model runs 1 to {config.num_loops}")
        if initial_state is None:
            return
        if not config.input_injection or self.model.skips_first_adapter:
            raise ValueError(f"this {config.family} model starts from its input and takes no initial_state")
        if (
            initial_state.dim() != 2
            or initial_state.shape[0] < size
            or initial_state.shape[1] != config.hidden_size
        ):
            shape = tuple(initial_state.shape)
            raise ValueError(f"initial_state is {shape}; ({size} or more, {config.hidden_size}) is wanted")


class _Checkpoint(NamedTuple):
    folder: Path
    family: Family
    config: LoopedConfig


def load_config(path: str | Path, *, generation_config: bool = True) -> LoopedConfig:
    """The config of a checkpoint folder; raises CheckpointError or ConfigError, both ValueError.

    Its `eos_token_ids` are those of every file that names some; `generation_config` false leaves out
    generation_config.json.
    """
    return _open(path, generation_config).config


def load_skeleton(path: str | Path) -> LoopedTransformer:
    """The model of a checkpoint folder without its weights, on the meta device; only headers are read.

    Raises what `load_model` raises, but for files that are damaged behind their headers.
    """
    checkpoint = _open(path)
    stored = stored_tensors(checkpoint.folder)
    model = _without_weights(checkpoint, stored)
    _matched(checkpoint, model, stored)
    return model


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    *,
    generation_config: bool = True,
) -> LoadedModel:
    """Loads a checkpoint folder onto a device; "auto" is float32 on the CPU and bfloat16 elsewhere.

    Tensors are read piece by piece straight into their place, so that memory peaks at little more than
    the weights. Raises CheckpointError (with every missing, unexpected and misshapen name), ConfigError
    or ValueError; all are ValueError.
    """
    wanted_device = _device(device)
    wanted_dtype = _dtype(dtype, wanted_device)
    checkpoint = _open(path, generation_config)
    stored = stored_tensors(checkpoint.folder)
    model = _without_weights(checkpoint, stored)
    places = _matched(checkpoint, model, stored)
    model = model.to(wanted_dtype).to_empty(device=wanted_device)
    model.tie()
    _fill(checkpoint, model, {name: stored[name] for name in places}, places)
    return LoadedModel(model.eval().requires_grad_(False), checkpoint.config)


def save_checkpoint(model: LoopedTransformer, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json and model.safetensors in the nanbeige layout, replacing what is there.

    Raises ValueError, before anything is written, for a model that the layout cannot hold. Each file
    is put in place whole.
    """
    raw = {**nanbeige.write_config(model.config), "torch_dtype": str(dtype).removeprefix("torch.")}
    config, parameters = model.config, model.state_dict()
    tensors = {
        name: parameters[place.parameter][place.rows(config)].to("cpu", dtype, copy=True).contiguous()
        for name, place in nanbeige.FAMILY.places(config)
        if place and place.parameter in parameters and not _is_tied_head(config, place)
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f"{SINGLE_FILE}.partial", folder / f"{CONFIG_FILE}.partial"
    save_file(tensors, weights, metadata={"format": "pt"})
    text.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(weights, folder / SINGLE_FILE)
    os.replace(text, folder / CONFIG_FILE)


def _open(path: str | Path, generation_config: bool = True) -> _Checkpoint:
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{str(path)!r} is not a local folder; a folder with {CONFIG_FILE} is wanted")
    raw = read_json(folder / CONFIG_FILE)
    # Only headers are read, and only where config.json leaves a choice.
    family = family_of(raw, stored_tensors(folder) if len(families_of(raw)) > 1 else ())
    config = family.read_config(raw)
    ending = ending_tokens(folder, config, read_json, generation_config=generation_config)
    return _Checkpoint(folder, family, replace(config, eos_token_ids=ending))


def _without_weights(checkpoint: _Checkpoint, stored: dict[str, StoredTensor]) -> LoopedTransformer:
    """The model on the meta device, which takes no memory whatever sizes config.json claims."""
    config, where = checkpoint.config, checkpoint.folder / CONFIG_FILE
    if config.num_layers > len(stored):
        raise CheckpointError(f"{where} says {config.num_layers} layers, but there are {len(stored)} tensors")
    # The one size that takes memory here: the rotary frequencies are real.
    if config.head_dim > (largest := max(math.prod(tensor.shape) for tensor in stored.values())):
        raise CheckpointError(
            f"{where} says head_dim {config.head_dim}, but no tensor has over {largest} numbers"
        )
    try:
        with torch.device("meta"):
            return LoopedTransformer(config)
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where} gives sizes that no model can have: {error}") from error


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {str(device)!r} is not one that torch knows") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but this machine has no CUDA device")
    return wanted


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; auto, {', '.join(DTYPES)} are possible")
    return DTYPES[name]


def _progress(num_bytes: int) -> "tqdm[NoReturn]":
    """A bar on stderr; where that is no terminal, a line now and then if loading takes long."""
    pause = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    return tqdm(desc="loading", total=num_bytes, mininterval=pause, delay=pause, **options)


def _is_tied_head(config: LoopedConfig, place: Place) -> bool:
    return config.tie_embeddings and place.parameter == HEAD


def _matched(
    checkpoint: _Checkpoint, model: LoopedTransformer, stored: dict[str, StoredTensor]
) -> dict[str, Place]:
    """Stored name -> place, dropped tensors left out; raises CheckpointError with all that is wrong."""
    folder, family, config = checkpoint
    parameters = model.state_dict()
    table = {n: p for n, p in family.places(config) if p is None or p.parameter in parameters}
    problems = [
        f"missing: {n}" for n, p in table.items() if p and n not in stored and not _is_tied_head(config, p)
    ]
    problems += [f"unexpected: {name}" for name in stored if name not in table]
    places = {name: place for name, place in table.items() if place and name in stored}
    problems += [
        p for name, place in places.items() for p in _misfits(name, place, stored[name], parameters, config)
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"{folder}: the tensors do not match {CONFIG_FILE} ({config.family}):\n  {listed}"
        )
    return places


def _misfits(
    name: str, place: Place, stored: StoredTensor, parameters: dict[str, Tensor], config: LoopedConfig
) -> Iterator[str]:
    filled = tuple(parameters[place.parameter][place.rows(config)].shape)
    wanted = place.shape(config) if place.shape else filled
    if stored.shape != wanted:
        yield f"shape: {name} is {list(stored.shape)}, {list(wanted)} is wanted"
    if stored.dtype not in _STORED_DTYPES:
        yield f"dtype: {name} is {stored.dtype}; {', '.join(_STORED_DTYPES)} can be read"


@torch.no_grad()
def _fill(
    checkpoint: _Checkpoint,
    model: LoopedTransformer,
    stored: dict[str, StoredTensor],
    places: dict[str, Place],
) -> None:
    """Copies every tensor into its rows; a tied head that is stored too is compared, last, and dropped."""
    parameters = model.state_dict()
    tied = {name: tensor for name, tensor in stored.items() if _is_tied_head(checkpoint.config, places[name])}
    own = {name: tensor for name, tensor in stored.items() if name not in tied}
    with _progress(sum(tensor.num_bytes for tensor in own.values())) as progress:
        for name, start, rows in read_tensors(own):
            target = parameters[places[name].parameter][places[name].rows(checkpoint.config)]
            _rows_of(target.view(own[name].shape), start, rows).copy_(rows)
            progress.update(rows.nbytes)
    for name, start, rows in read_tensors(tied):
        if not torch.equal(rows.to(model.device, model.dtype), _rows_of(parameters[HEAD], start, rows)):
            raise CheckpointError(
                f"{tied[name].file}: {name} differs from the embedding that the config ties it to"
            )


def _rows_of(target: Tensor, start: int, rows: Tensor) -> Tensor:
    """The part of a tensor that a piece from row `start` on covers; all of one without dimensions."""
    return target[start : start + len(rows)] if rows.dim() else target
