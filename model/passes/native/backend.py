"""Passes by the native library: arrays of rows in, tokens and logits out.

`NativePasses` knows arrays alone; `NativeBackend` makes them of a pass's rows and lets the sampler draw
where a row wants more than the likeliest token. Invariant: a row's logits have the same bits whatever else
is in its pass, however many threads run, and whatever passes came before.
"""

import ctypes
import os
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.network.config import LoopedConfig
from model.network.looped import LoopedTransformer
from model.passes.backend import BackendFacts
from model.passes.native import structs
from model.passes.native.library import NativeUnavailableError, choose, load
from model.passes.native.weights import PackedModel, allocate
from model.passes.noise import state_noise
from model.passes.rows import Rows
from model.passes.sampling import RowwiseSampler, is_plain_greedy
from model.passes.scores import Reader
from model.schedule.batch import PassResult, Readout, Readouts

SPIN_MICROSECONDS = 100  # that a thread waits for others before it sleeps
_ERROR_BYTES = 300

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class NativeOptions:
    """How a model is held and run. `threads` 0: as many as the process may use."""

    threads: int = 0
    half_cache: bool = True  # K and V in fp16, else in fp32
    int4: bool = False  # linear layers in int4
    level: str | None = None  # of CPU instructions; None: the best
    spin_microseconds: int = SPIN_MICROSECONDS

    def bytes_per_token(self, model: LoopedTransformer) -> int:
        """See BackendMaker."""
        config, item = model.config, 2 if self.half_cache else 4
        padded = -(-config.head_dim // structs.BLOCK) * structs.BLOCK  # of a value
        kv = config.num_slots * config.num_kv_heads * (config.head_dim + padded) * item
        return kv + (2 if config.input_injection else 1) * config.hidden_size * 4

    def make(self, model: LoopedTransformer, num_tokens: int, max_positions: int) -> "NativeBackend":
        """See BackendMaker. Raises NativeUnavailableError where the library doesn't cover the model."""
        return NativeBackend(model, num_tokens, max_positions, self)


@dataclass(frozen=True)
class RowArrays:
    """The rows of a pass, one entry a row but for `pages` and `noise`.

    Row i stands at `positions[i]` of the sequence whose page numbers are in `pages` from `tables[i]` on, and
    does loop `loops[i]` (0..R-1); in its first one it reads `tokens[i]`. With `ends[i]` the coda runs behind
    the loop, as it must for rows that are read out. `noises[i]` is the row of `noise` (n, hidden) that its
    state starts from, or -1.
    """

    tokens: Ints
    positions: Ints
    loops: Ints
    tables: Ints
    pages: Ints
    ends: NDArray[np.uint8]
    noises: Ints | None = None
    noise: Floats | None = None


@dataclass(frozen=True)
class NativeResult:
    """The likeliest token of every readout, and the logits (n, vocab) of those that asked for them."""

    tokens: Ints
    logits: Floats


class NativePasses:
    """A packed model with its K/V and states. Not for two threads at once."""

    def __init__(
        self, model: LoopedTransformer, num_tokens: int, max_positions: int, options: NativeOptions
    ) -> None:
        """Raises NativeUnavailableError where there is no library or it doesn't cover the model."""
        self.level = choose(options.level)
        self._library = load(self.level)
        self.packed = PackedModel(self._library, model, max_positions, int4=options.int4)
        self.config = model.config
        self.num_threads = options.threads or len(os.sched_getaffinity(0))
        num_pages = num_tokens // structs.PAGE
        size = self._library.speed_cache_bytes(self.packed.description, num_pages, options.half_cache)
        self._cache = allocate(size)
        states = 2 if model.config.input_injection else 1
        self._states = allocate(states * num_pages * structs.PAGE * model.config.hidden_size * 4)
        setup = structs.Setup(
            num_threads=self.num_threads,
            spin_microseconds=options.spin_microseconds,
            num_pages=num_pages,
            half_cache=options.half_cache,
            cache=self._cache.ctypes.data,
            states=self._states.ctypes.data,
        )
        self._error = ctypes.create_string_buffer(_ERROR_BYTES)
        self._engine = self._library.speed_open(self.packed.description, setup, self._error, _ERROR_BYTES)
        if not self._engine:
            raise NativeUnavailableError(self._problem())
        weakref.finalize(self, self._library.speed_close, self._engine)

    def run(self, rows: RowArrays, readouts: Ints, logit_rows: Ints) -> NativeResult:
        """One pass. `readouts` are rows; `logit_rows` where each one's logits go in the result, or -1.

        Raises ValueError, with nothing changed, for numbers that are out of range.
        """
        tokens = np.empty(len(readouts), np.int32)
        num_logits = int(logit_rows.max(initial=-1)) + 1
        logits = np.empty((num_logits, self.config.vocab_size), np.float32)
        work = structs.Pass(
            num_rows=len(rows.positions),
            num_pages=len(rows.pages),
            num_readouts=len(readouts),
            num_logits=num_logits,
            num_noise=0 if rows.noise is None else len(rows.noise),
            readouts=readouts.ctypes.data,
            logit_rows=logit_rows.ctypes.data,
            tokens_out=tokens.ctypes.data,
            logits=logits.ctypes.data,
            **{name: value.ctypes.data for name, value in vars(rows).items() if value is not None},
        )
        if self._library.speed_run(self._engine, work, self._error, _ERROR_BYTES):
            raise ValueError(self._problem())
        return NativeResult(tokens, logits)

    def _problem(self) -> str:
        return self._error.value.decode(errors="replace")


class NativeBackend:
    """Passes by the native library; see Backend."""

    def __init__(
        self, model: LoopedTransformer, num_tokens: int, max_positions: int, options: NativeOptions
    ) -> None:
        self.model = model
        self.passes = NativePasses(model, num_tokens, max_positions, options)
        self.sampler = RowwiseSampler(model.config.vocab_size, torch.device("cpu"))
        # What the reader multiplies with a head are logits already.
        self.reader = Reader(lambda logits: logits, self.sampler)
        self.facts = BackendFacts(
            name="native",
            device="cpu",
            dtype=str(model.dtype).removeprefix("torch."),
            is_exact=True,
            bytes_per_token=options.bytes_per_token(model),
        )

    @torch.inference_mode()
    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """See Backend."""
        predicting, scoring = readouts
        numbers = [readout.row for readout in predicting]
        for prompt in scoring:
            numbers.extend(range(prompt.row, prompt.row + prompt.num_rows))
        wants = [_wants_logits(readout) for readout in predicting] + [True] * (len(numbers) - len(predicting))
        logit_rows = np.full(len(numbers), -1, np.int32)
        logit_rows[wants] = np.arange(sum(wants))
        arrays = row_arrays(rows, readouts, self.model.config)
        found = self.passes.run(arrays, np.array(numbers, np.int32), logit_rows)
        tokens: list[int] = found.tokens[: len(predicting)].tolist()
        if not len(found.logits):
            return PassResult(tokens, {}, [], {})
        drawn = [index for index in range(len(predicting)) if wants[index]]
        read = self.reader.read(
            torch.from_numpy(found.logits), Readouts([predicting[index] for index in drawn], scoring)
        )
        for index, token in zip(drawn, read.tokens, strict=True):
            tokens[index] = token
        scores = {drawn[index]: score for index, score in read.scores.items()}
        return PassResult(tokens, scores, read.prompt_scores, read.faults)


def row_arrays(rows: Rows, readouts: Readouts, config: LoopedConfig) -> RowArrays:
    """The rows of a pass as the library reads them."""
    count = len(rows)
    tokens, tables = np.zeros(count, np.int32), np.zeros(count, np.int32)
    tokens[rows.entering] = rows.token_ids
    ends = np.zeros(count, np.uint8)
    pages: list[int] = []
    first_page: dict[int, int] = {}
    for run, first, is_last in zip(rows.runs, rows.first_rows, rows.ends_loops, strict=True):
        if id(run.table) not in first_page:
            first_page[id(run.table)] = len(pages)
            pages.extend(run.table.pages)
        tables[first : first + run.num_rows] = first_page[id(run.table)]
        ends[first : first + run.num_rows] = is_last
    ends[[readout.row for readout in readouts.predicting]] = 1
    noises, noise = _noise(rows, config)
    return RowArrays(
        tokens,
        rows.positions.astype(np.int32),
        rows.loops.astype(np.int32),
        tables,
        np.array(pages, np.int32),
        ends,
        noises,
        noise,
    )


def _noise(rows: Rows, config: LoopedConfig) -> tuple[Ints | None, Floats | None]:
    """Where states start from noise: its row for each row, and the noise."""
    if not rows.noises:
        return None, None
    places, parts, total = np.full(len(rows), -1, np.int32), list[Floats](), 0
    for first, num_rows, seed, start, scale in rows.noises:
        noise = state_noise(seed, start, num_rows, config.hidden_size)
        places[rows.entering[first : first + num_rows]] = np.arange(total, total + num_rows)
        parts.append((noise * (scale * config.initial_state_std)).numpy())
        total += num_rows
    return places, np.concatenate(parts)


def _wants_logits(readout: Readout) -> bool:
    """Whether the likeliest token is not all that is asked for; the last word is looked at for numbers."""
    return (readout.is_final and readout.sequence.request.logprobs is not None) or not is_plain_greedy(
        readout
    )
