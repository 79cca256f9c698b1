"""From a checkpoint folder to a model ready to run, and back.

Knows the families only through their tables. A matrix that is stored in int8 is widened, or kept as it is
where int8 is asked for. Invariant: a model is returned whole or not at all; every parameter is filled by
exactly the tensors that its family's table names, and every tensor on disk is accounted for.
"""

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from model.checkpoint.amended import amended
from model.checkpoint.ending import ending_tokens
from model.checkpoint.families import Family, Place, families_of, family_of, layout_of
from model.checkpoint.families.quantized import NVFP4, SUPPORTED, int8_fields, stored_in_int8
from model.checkpoint.files import (
    CheckpointError,
    Piece,
    StoredTensor,
    read_json,
    read_tensors,
    stored_tensors,
)
from model.checkpoint.hub import SINGLE_FILE
from model.checkpoint.int8 import can_be_int8, in_int8, read_scales, scale_name, useless_scales, widen
from model.checkpoint.placement import EMBEDDING, HEAD, Match, is_tied_head, match
from model.machine import free_memory
from model.network.config import ConfigError, LoopedConfig
from model.network.int8 import ADAPTER, quantize_linears, quantized
from model.network.looped import LoopedTransformer

__all__ = [
    "CheckpointError",
    "LoadedModel",
    "is_stored_in_int8",
    "load_config",
    "load_model",
    "load_skeleton",
    "save_checkpoint",
]

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"  # where NVIDIA's exports say how they are quantised
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS_BETWEEN_LINES = 5.0  # of progress, in a log


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
        prefix: int | None = None,
        encoder_ids: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits (tokens, vocab) in fp32 after `num_loops` loops (1..R; None is R), without a cache.

        `initial_state` (at least tokens, hidden) replaces the zeros, or the input, that a model with
        input injection starts from. In a model that reads its prompt both ways the first `prefix` tokens
        are the prompt, all by default. `encoder_ids` is the source of a model with an encoder; `input_ids`
        begin with its start token then. Raises ValueError, with the limits, for anything out of range.
        """
        loops = self.config.num_loops if num_loops is None else num_loops
        given = None if initial_state is None else torch.as_tensor(initial_state)
        self._check(input_ids, loops, given)
        both_ways = self._prefix(len(input_ids), prefix)
        ids = torch.tensor([list(input_ids)], device=self.model.device)
        if given is not None:
            given = given[: len(input_ids)].to(self.model.device, self.model.dtype)
        source = self._source(encoder_ids)
        with torch.inference_mode():
            encoded = None if source is None else self.model.encode(source)
            state = self.model.depths(ids, loops, given, both_ways, encoded)[-1]
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

    def _source(self, encoder_ids: Sequence[int] | None) -> Tensor | None:
        """The source's ids (1, tokens) for a model with an encoder."""
        if (encoder_ids is None) == (self.config.encoder is not None):
            needs = (
                "needs encoder_ids, the source" if self.config.encoder else "has no encoder for encoder_ids"
            )
            raise ValueError(f"this {self.config.family} model {needs}")
        if encoder_ids is None:
            return None
        self._check(encoder_ids, 1, None)
        return torch.tensor([list(encoder_ids)], device=self.model.device)

    def _prefix(self, size: int, prefix: int | None) -> int:
        if not self.config.prefix_lm:
            if prefix:
                raise ValueError(
                    f"prefix is {prefix}, but this {self.config.family} model reads all causally"
                )
            return 0
        if prefix is not None and not 0 <= prefix <= size:
            raise ValueError(f"prefix is {prefix}; 0 to {size}, the tokens given, are possible")
        return size if prefix is None else prefix

    def _check(self, input_ids: Sequence[int], num_loops: int, initial_state: Tensor | None) -> None:
        config, size = self.config, len(input_ids)
        if not 1 <= size <= config.max_positions:
            raise ValueError(f"{size} tokens given; 1 to {config.max_positions} are possible")
        for token in input_ids:
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"token id {token} is not in the vocabulary, 0 to {config.vocab_size - 1}")
        if not 1 <= num_loops <= config.most_loops:
            raise ValueError(f"num_loops is {num_loops}; this model runs 1 to {config.most_loops}")
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
    raw: dict[str, Any]  # what config.json holds

    @property
    def int8(self) -> bool:
        """Whether matrices are stored in int8."""
        return stored_in_int8(self.raw)

    def with_room_for(self, max_loops: int | None) -> "_Checkpoint":
        """This checkpoint with room for `max_loops`; raises ConfigError for too few loops or too many."""
        own = self.config.num_loops
        if max_loops is None:
            return self
        if max_loops > own and not self.family.is_elastic:
            raise ConfigError(
                f"max_loops is {max_loops}, but this {self.family.name} model is trained for {own} loops: "
                "more of them make its text worse"
            )
        return self._replace(config=replace(self.config, max_loops=max_loops))

    def amended(self, stored: dict[str, StoredTensor]) -> "_Checkpoint":
        """This checkpoint with a config that its tensors agree with."""
        return self._replace(config=amended(self.config, self.family, self.raw, stored))


def load_config(path: str | Path, *, generation_config: bool = True) -> LoopedConfig:
    """The config of a checkpoint folder; raises CheckpointError or ConfigError, both ValueError.

    Its `eos_token_ids` are those of every file that names some; `generation_config` false leaves out
    generation_config.json.
    """
    return _open(path, generation_config).config


def is_stored_in_int8(path: str | Path) -> bool:
    """Whether a checkpoint folder's config.json says int8 matrices; raises as `load_config` does."""
    return stored_in_int8(_read_config(path))


def load_skeleton(path: str | Path, max_loops: int | None = None) -> LoopedTransformer:
    """The model of a checkpoint folder without its weights, on the meta device; only headers are read.

    `max_loops`: see `load_model`. Raises what that does, but for files that are damaged behind their headers.
    """
    checkpoint = _open(path).with_room_for(max_loops)
    stored = stored_tensors(checkpoint.folder)
    checkpoint = checkpoint.amended(stored)
    model = _without_weights(checkpoint, stored)
    _refuse(checkpoint, _match(checkpoint, model, stored).problems)
    return model


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    *,
    generation_config: bool = True,
    int8: bool = False,
    max_loops: int | None = None,
) -> LoadedModel:
    """Loads a checkpoint folder onto a device; "auto" is float32 on the CPU and bfloat16 elsewhere.

    `int8` holds linear layers in int8, as `quantize_linears` does to a loaded model, but an int8 matrix
    on disk is kept bit for bit. `max_loops` makes room for more loops than config.json says, where the family
    is trained for that. Tensors are read piece by piece straight into their place, so that memory peaks at
    little more than the weights. Raises CheckpointError (with every missing, unexpected and misshapen name),
    ConfigError or ValueError; all are ValueError.
    """
    wanted_device = _device(device)
    wanted_dtype = _dtype(dtype, wanted_device)
    checkpoint = _open(path, generation_config).with_room_for(max_loops)
    stored = stored_tensors(checkpoint.folder)
    checkpoint = checkpoint.amended(stored)
    model = _without_weights(checkpoint, stored)
    found = _match(checkpoint, model, stored)
    scales = read_scales(found.scales)
    _refuse(checkpoint, [*found.problems, *useless_scales(scales)])
    model = model.to(wanted_dtype)
    if int8:
        quantize_linears(model)
    _warn_if_too_large(model, wanted_device)
    _allocate(model, wanted_device)
    if not int8:  # there a tied head has weights of its own
        model.tie()
    filling = _Filling(model.state_dict(), checkpoint.config, found.places, scales)
    _fill(filling, {name: stored[name] for name in found.places})
    return LoadedModel(model.eval().requires_grad_(False), checkpoint.config)


def save_checkpoint(
    model: LoopedTransformer, folder: Path, dtype: torch.dtype, *, int8: bool = False
) -> None:
    """Writes config.json and model.safetensors, replacing what is there.

    The layout is that of the family that holds the model (`layout_of`). With `int8` matrices are stored in
    int8, rounded from the model's own dtype, and only the rest, the adapter with it as in
    `quantize_linears`, in `dtype`. Raises ValueError, before anything is written, for a model that the
    layout cannot hold. Each file is put in place whole.
    """
    config, parameters = model.config, model.state_dict()
    family, layout = layout_of(config)
    adapter = f"{ADAPTER}.weight"
    kept = {name for name, place in family.places(config) if place and place.parameter == adapter}
    ignored = [name.removesuffix(".weight") for name in sorted(kept)]
    raw = {**layout.write_config(config), **(int8_fields(ignored) if int8 else {})}
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")
    parts = {
        name: parameters[place.parameter][place.rows(config)]
        for name, place in family.places(config)
        if place and place.parameter in parameters and not is_tied_head(config, place)
    }
    matrices = {n: part for n, part in parts.items() if int8 and n not in kept and can_be_int8(n, part.shape)}
    rest = {n: part.to("cpu", dtype, copy=True) for n, part in parts.items() if n not in matrices}
    tensors = {name: tensor.contiguous() for name, tensor in {**rest, **in_int8(matrices)}.items()}
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f"{SINGLE_FILE}.partial", folder / f"{CONFIG_FILE}.partial"
    save_file(tensors, weights, metadata={"format": "pt"})
    text.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(weights, folder / SINGLE_FILE)
    os.replace(text, folder / CONFIG_FILE)


def _read_config(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_dir():
        raise CheckpointError(f"{str(path)!r} is not a local folder; a folder with {CONFIG_FILE} is wanted")
    return read_json(Path(path) / CONFIG_FILE)


def _open(path: str | Path, generation_config: bool = True) -> _Checkpoint:
    folder, raw = Path(path), _read_config(path)
    # Only headers are read, and only where config.json leaves a choice.
    family = family_of(raw, stored_tensors(folder) if len(families_of(raw)) > 1 else ())
    config = family.read_config(raw)
    ending = ending_tokens(folder, config, read_json, family.turn_end, generation_config=generation_config)
    stored_in_int8(raw)  # raises for a quantisation that can't be read
    if (folder / MODELOPT_FILE).exists():
        raise CheckpointError(
            f"{folder / MODELOPT_FILE}: {_modelopt_problem(read_json(folder / MODELOPT_FILE))}"
        )
    return _Checkpoint(folder, family, replace(config, eos_token_ids=ending), raw)


def _modelopt_problem(raw: dict[str, Any]) -> str:
    if "nvfp4" in repr(raw).lower():
        return NVFP4
    return f"quantised checkpoints are read only as {SUPPORTED}"


def _without_weights(checkpoint: _Checkpoint, stored: dict[str, StoredTensor]) -> LoopedTransformer:
    """The model on the meta device, which takes no memory whatever sizes config.json claims."""
    config, where = checkpoint.config, checkpoint.folder / CONFIG_FILE
    num_layers = config.num_layers + (config.encoder.num_layers if config.encoder else 0)
    if num_layers > len(stored):
        raise CheckpointError(f"{where} says {num_layers} layers, but there are {len(stored)} tensors")
    # The one size that takes memory here: the rotary frequencies are real.
    if config.head_dim > (largest := max(math.prod(tensor.shape) for tensor in stored.values())):
        raise CheckpointError(
            f"{where} says head_dim {config.head_dim}, but no tensor has over {largest} numbers"
        )
    try:
        with torch.device("meta"), _Uninitialised():
            return LoopedTransformer(config)
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where} gives sizes that no model can have: {error}") from error


class _Uninitialised(TorchFunctionMode):
    """Leaves `nn.init` out: there is nothing to fill yet, and on the meta device it imports torch's compiler.

    That import takes longer than all else here: 1.0 of 1.3 s for 61 million parameters in int8.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


def _allocate(model: LoopedTransformer, device: torch.device) -> None:
    """Gives the model memory on `device`; `to_empty` would import sympy for that, which takes 0.3 s."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    model._apply(empty)  # type: ignore[no-untyped-call]


def _warn_if_too_large(model: LoopedTransformer, device: torch.device) -> None:
    """Says what a kernel that ends the process would not: that weights take more memory than is free."""
    size = sum(tensor.nbytes for tensor in {id(t): t for t in model.state_dict().values()}.values())
    if device.type == "cpu" and size > (free := free_memory().free):
        log.warning(
            "the weights take %d MiB and %d MiB of memory are free: the process may be killed as they load",
            size >> 20,
            free >> 20,
        )


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
    # Its own lock holds for other processes as well: from Python 3.14 on a named semaphore, of which there
    # is a warning at the end of a process that ends as the worker does.
    tqdm.set_lock(threading.RLock())
    pause = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    return tqdm(desc="loading", total=num_bytes, mininterval=pause, delay=pause, **options)


def _match(checkpoint: _Checkpoint, model: LoopedTransformer, stored: dict[str, StoredTensor]) -> Match:
    return match(checkpoint.family, checkpoint.config, model.state_dict(), stored, checkpoint.int8)


def _refuse(checkpoint: _Checkpoint, problems: list[str]) -> None:
    """Raises CheckpointError with all that is wrong, if anything is."""
    if problems:
        listed, family = "\n  ".join(problems), checkpoint.config.family
        raise CheckpointError(
            f"{checkpoint.folder}: the tensors do not match {CONFIG_FILE} ({family}):\n  {listed}"
        )


class _Filling(NamedTuple):
    """A model on its way: its parameters and buffers by name, where each tensor goes, and int8's scales."""

    parameters: dict[str, Tensor]
    config: LoopedConfig
    places: dict[str, Place]
    scales: dict[str, Tensor]

    def scales_of(self, piece: Piece) -> Tensor | None:
        """(rows,), for a piece of an int8 matrix."""
        scales = self.scales.get(scale_name(piece.name))
        return None if scales is None else scales[piece.start : piece.start + len(piece.rows)]

    def write(self, piece: Piece, shape: tuple[int, ...]) -> None:
        """Copies a piece of a tensor of this shape to where it belongs; a tied head may be held apart."""
        place = self.places[piece.name]
        self._write(piece, shape, place)
        if (
            place.parameter == EMBEDDING
            and self.config.tie_embeddings
            and _scales_name(HEAD) in self.parameters
        ):
            self._write(piece, shape, replace(place, parameter=HEAD))

    def _write(self, piece: Piece, shape: tuple[int, ...], place: Place) -> None:
        part = place.rows(self.config)
        target = _rows_of(self.parameters[place.parameter][part].view(shape), piece.start, piece.rows)
        scales, held = self.scales_of(piece), self.parameters.get(_scales_name(place.parameter))
        if held is not None:
            weight, scales = quantized(piece.rows) if scales is None else (piece.rows, scales)
            target.copy_(weight)
            _rows_of(held[part], piece.start, piece.rows).copy_(scales)
        elif scales is not None:
            widen(piece.rows, scales, target)
        else:
            target.copy_(piece.rows)


def _scales_name(parameter: str) -> str:
    """The buffer beside the weight of an `Int8Linear`."""
    return f"{parameter.removesuffix('weight')}scales"


@torch.no_grad()
def _fill(filling: _Filling, stored: dict[str, StoredTensor]) -> None:
    """Copies every tensor into its rows; a tied head that is stored too, the embedding again, is left out."""
    own = {n: tensor for n, tensor in stored.items() if not is_tied_head(filling.config, filling.places[n])}
    with _progress(sum(tensor.num_bytes for tensor in own.values())) as progress:
        for piece in read_tensors(own):
            filling.write(piece, own[piece.name].shape)
            progress.update(piece.rows.nbytes)


def _rows_of(target: Tensor, start: int, rows: Tensor) -> Tensor:
    """The part of a tensor that a piece from row `start` on covers; all of one without dimensions."""
    return target[start : start + len(rows)] if rows.dim() else target
