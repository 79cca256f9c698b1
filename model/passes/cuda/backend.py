"""Passes on an NVIDIA GPU: one transfer in, one CUDA graph, one transfer out.

Where tokens need more than logits, a temperature and noise (filters, penalties, a grammar, scores), they are
chosen behind the graph by the operators that the torch backend has, on the device as well. Invariant: a row's
bits never depend on the other rows, so speculation changes no token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.network.looped import LoopedTransformer
from model.passes.backend import BackendFacts, CacheBytes
from model.passes.cuda.graphs import Buffers, Eager, Graphs, Runner
from model.passes.cuda.inputs import Inputs, is_simple, pass_inputs
from model.passes.cuda.operations import Operations, Shape, Tile, TritonOperations
from model.passes.cuda.passes import CudaCache, Done, Kind, Step
from model.passes.cuda.weights import Weights
from model.passes.kv import head_bytes
from model.passes.noise import state_noise
from model.passes.rows import Rows
from model.passes.sampling import Sampler
from model.passes.scores import Reader, not_a_number
from model.passes.tensors import array_to_device, to_device
from model.schedule.batch import PassResult, Readouts
from model.schedule.sequence import Sequence

_WORD = 2**64
PAGE_SIZE = 16  # positions; the engine's
DEFAULT_TILE = Tile()


@dataclass(frozen=True)
class CudaOptions:
    """How a model is run. Without `graphs` every kernel is launched by itself, as it must be on a CPU."""

    graphs: bool = True
    tile: Tile = DEFAULT_TILE
    operations: Callable[[Shape, Tile], Operations] = TritonOperations

    @property
    def name(self) -> str:
        """The backend's name, as its facts have it."""
        return "cuda"

    def cache_bytes(self, model: LoopedTransformer) -> CacheBytes:
        """What a token takes of the cache: K/V in the model's dtype, states in fp32."""
        config = model.config
        states = config.hidden_size * (2 if config.keeps_input else 1)
        kv = config.kv_heads_per_token * head_bytes(config.head_dim, model.dtype)
        return CacheBytes(kv, states * 4, str(model.dtype).removeprefix("torch."))

    def make(self, model: LoopedTransformer, num_tokens: int, max_positions: int) -> "CudaBackend":
        """A backend of a model that the kernels cover, on the model's device."""
        return CudaBackend(model, num_tokens, max_positions, self)


class CudaBackend:
    """A `Backend` whose passes are kernels of one tile shape whatever the number of rows."""

    @torch.inference_mode()
    def __init__(
        self, model: LoopedTransformer, num_tokens: int, max_positions: int, options: CudaOptions
    ) -> None:
        self.model, self.device = model, model.device
        weights = Weights.of(model, max_positions)
        shape = Shape(model.config, model.dtype, weights.cosines, weights.sines, PAGE_SIZE)
        self.operations = options.operations(shape, options.tile)
        self.cache = CudaCache(model.config, num_tokens, self.device, model.dtype)
        self.step = Step(model, weights, self.cache, self.operations)
        self._pages_of_a_row = -(-max_positions // PAGE_SIZE)
        self._buffers: dict[int, Buffers] = {}
        sampler = _Sampler(model.config.vocab_size, self.device, self.operations)
        self.reader = Reader(self._logits, sampler, model.gate if model.config.exit_gate else None)
        is_captured = options.graphs and self.device.type == "cuda"
        self.runner: Runner = Graphs(self.step, self.buffers) if is_captured else Eager(self.step)
        self.facts = BackendFacts(
            name=options.name,
            device=str(self.device),
            dtype=str(model.dtype).removeprefix("torch."),
            kv_cache_dtype=options.cache_bytes(model).dtype,
            is_exact=True,
            bytes_per_token=options.cache_bytes(model).per_token,
        )

    def buffers(self, bucket: int) -> Buffers:
        """Where the numbers of passes of so many rows lie."""
        if bucket not in self._buffers:
            most_pages = bucket * self._pages_of_a_row
            self._buffers[bucket] = Buffers(bucket, most_pages, self.model.config.hidden_size, self.device)
        return self._buffers[bucket]

    @torch.inference_mode()
    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """Runs one loop for every row and reads out; waits for the device once if there is a readout."""
        is_simple_pass = not (readouts.scoring or readouts.keeping) and all(
            map(is_simple, readouts.predicting)
        )
        inputs = pass_inputs(rows, readouts, self.cache.spare, with_choice=is_simple_pass)
        done = self._run(inputs, rows)
        if is_simple_pass:
            return _chosen(done, readouts)
        wanted = to_device(_wanted(readouts), torch.int64, self.device)
        return self.reader.read(self.step.finish(done.states.index_select(0, wanted)), readouts)

    def _run(self, inputs: Inputs, rows: Rows) -> Done:
        buffers = self.buffers(inputs.bucket)
        buffers.fill(inputs.numbers)
        has_noise = self._fill_noise(buffers, rows)
        ends = inputs.ends and self.model.config.num_coda_layers > 0
        done = self.runner.run(Kind(inputs.bucket, inputs.enters, ends, inputs.chooses), buffers)
        if has_noise:
            buffers.noise.zero_()
        return done

    def _fill_noise(self, buffers: Buffers, rows: Rows) -> bool:
        """Puts the noise that states start from where the step looks for it; whether there is any."""
        noises = rows.noises()
        for first, num_rows, seed, start, scale in noises:
            noise = state_noise(seed, start, num_rows, self.model.config.hidden_size)
            noise *= scale * self.model.config.initial_state_std
            places = rows.entering[first : first + num_rows]
            buffers.noise[array_to_device(places, self.device)] = noise.to(self.device)
        return bool(noises)

    def _logits(self, inputs: Tensor) -> Tensor:
        """Logits (rows, vocab), fp32, of the head's inputs (rows, hidden)."""
        if not len(inputs):
            return inputs.new_empty(0, self.model.config.vocab_size, dtype=torch.float32)
        sums, matrix = self.step.logits(inputs.contiguous())
        return sums[0] if matrix.scales is None else sums[0] * matrix.scales


class _Sampler(Sampler):
    """The sampler of the torch backend, with noise by one kernel."""

    def __init__(self, vocab_size: int, device: torch.device, operations: Operations) -> None:
        super().__init__(vocab_size, device)
        self._operations = operations

    def _noise(self, keys: list[tuple[int, int]]) -> Tensor:
        seeds = np.array([seed % _WORD for seed, _ in keys], np.uint64).view(np.int64)
        positions = np.array([position for _, position in keys], np.int64)
        both = array_to_device(np.stack((seeds, positions)), self.device)
        return self._operations.noise(both[0], both[1])


def _wanted(readouts: Readouts) -> list[int]:
    """The rows that are read, in the order that `Reader.read` wants."""
    wanted = [readout.row for readout in readouts.predicting]
    for prompt in readouts.scoring:
        wanted.extend(range(prompt.row, prompt.row + prompt.num_rows))
    return wanted + [kept.row for kept in readouts.keeping]


def _chosen(done: Done, readouts: Readouts) -> PassResult:
    """The tokens that the device chose, by one transfer; those of rows without numbers are faults."""
    if done.chosen is None:
        return PassResult([], {}, [], {})
    faults: dict[Sequence, str] = {}
    tokens = list[int]()
    for readout, (token, logit) in zip(readouts.predicting, done.chosen.tolist(), strict=False):
        tokens.append(int(token))
        if readout.is_final and not math.isfinite(logit):
            faults[readout.sequence] = not_a_number(readout.position, logit)
    return PassResult(tokens, {}, [], faults)
