"""Passes by the native library: arrays of rows in, tokens and logits out.

`NativePasses` knows arrays alone; `NativeBackend` makes them of a pass's rows and of what its readouts ask.
Invariant: a row's logits, and what is chosen and scored by them, have the same bits whatever else is in its
pass, however many threads run, and whatever passes came before.
"""

import ctypes
import math
import os
import weakref
from collections import abc
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from model.network.config import LoopedConfig
from model.network.looped import LoopedTransformer
from model.passes.backend import BackendFacts, CacheBytes
from model.passes.native import structs
from model.passes.native.choosing import Asked, Scores
from model.passes.native.library import NativeUnavailableError, choose, load
from model.passes.native.weights import PackedModel, allocate
from model.passes.noise import state_noise
from model.passes.rows import Rows
from model.passes.scores import not_a_number
from model.protocol import TokenLogprobs
from model.schedule.batch import PassResult, PromptReadout, Readouts
from model.schedule.sequence import Sequence

SPIN_MICROSECONDS = 100  # that a thread waits for others before it sleeps
NO_TOKEN = -1
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

    @property
    def name(self) -> str:
        """The backend's name, as its facts have it."""
        return "native"

    def cache_bytes(self, model: LoopedTransformer) -> CacheBytes:
        """What a token takes of the cache. The model needs no weights."""
        config, item = model.config, 2 if self.half_cache else 4
        padded = -(-config.head_dim // structs.BLOCK) * structs.BLOCK  # of a value
        kv = config.num_slots * config.num_kv_heads * (config.head_dim + padded) * item
        return CacheBytes(kv, (2 if config.keeps_input else 1) * config.hidden_size * 4)

    def make(self, model: LoopedTransformer, num_tokens: int, max_positions: int) -> "NativeBackend":
        """A backend of the model. Raises NativeUnavailableError where the library doesn't cover it."""
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
    """The likeliest token of every readout, and the logits (n, vocab) of those that asked for them.

    The token is NO_TOKEN where a logit is infinite or no number.
    """

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
        states = 2 if model.config.keeps_input else 1
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
        self._scratch = allocate(self._library.speed_scratch_bytes(self._engine))
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

    def fill_cache(self, byte: int) -> None:
        """Overwrites all K/V and states, as other texts would: nothing of them may show."""
        self._cache[:] = byte
        self._states[:] = byte

    def times(self) -> dict[str, float]:
        """Seconds that each part of all passes took since the last call, by `structs.PARTS`."""
        found = (ctypes.c_int64 * len(structs.PARTS))()
        self._library.speed_times(self._engine, found)
        return {part: found[index] / 1e9 for index, part in enumerate(structs.PARTS)}

    def choose(self, logits: Floats, rows: Ints, choices: "NDArray[np.void]") -> Ints:
        """A token by each of these `rows` of logits (n, vocab), as `choices` (choosing.CHOICE) say.

        Raises ValueError for numbers that are out of range.
        """
        tokens = np.empty(len(rows), np.int32)
        work = structs.Choosing(
            num_rows=len(rows),
            num_logits=len(logits),
            logits=logits.ctypes.data,
            rows=rows.ctypes.data,
            choices=choices.ctypes.data,
            tokens=tokens.ctypes.data,
            scratch=self._scratch.ctypes.data,
        )
        if self._library.speed_choose(self._engine, work, self._error, _ERROR_BYTES):
            raise ValueError(self._problem())
        return tokens

    def score(self, logits: Floats, rows: Ints, tokens: Ints, num_top: int) -> Scores:
        """What these `rows` of logits (n, vocab) say of one token each, and which are likeliest.

        Raises ValueError for numbers that are out of range.
        """
        num_rows, num_top = len(rows), min(num_top, self.config.vocab_size)
        logprobs, ranks = np.empty(num_rows, np.float32), np.empty(num_rows, np.int32)
        top_tokens, top_logprobs = (
            np.empty((num_rows, num_top), np.int32),
            np.empty((num_rows, num_top), np.float32),
        )
        work = structs.Scoring(
            num_rows=num_rows,
            num_logits=len(logits),
            num_top=num_top,
            logits=logits.ctypes.data,
            rows=rows.ctypes.data,
            tokens=tokens.ctypes.data,
            logprobs=logprobs.ctypes.data,
            ranks=ranks.ctypes.data,
            top_tokens=top_tokens.ctypes.data,
            top_logprobs=top_logprobs.ctypes.data,
        )
        if self._library.speed_score(self._engine, work, self._error, _ERROR_BYTES):
            raise ValueError(self._problem())
        return Scores(tokens, logprobs, ranks, top_tokens, top_logprobs)

    def _problem(self) -> str:
        return self._error.value.decode(errors="replace")


class NativeBackend:
    """A `Backend` whose passes the native library computes."""

    def __init__(
        self, model: LoopedTransformer, num_tokens: int, max_positions: int, options: NativeOptions
    ) -> None:
        self.model = model
        self.passes = NativePasses(model, num_tokens, max_positions, options)
        self.facts = BackendFacts(
            name=options.name,
            device="cpu",
            dtype=str(model.dtype).removeprefix("torch."),
            is_exact=True,
            bytes_per_token=options.cache_bytes(model).per_token,
        )

    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """Runs one loop for every row of a pass and reads out what is asked for."""
        predicting, scoring = readouts
        faults: dict[Sequence, str] = {}
        asked = Asked.of(predicting, faults)
        numbers = [readout.row for readout in predicting]
        for prompt in scoring:
            numbers.extend(range(prompt.row, prompt.row + prompt.num_rows))
        logit_rows = _logit_rows(asked, len(predicting), len(numbers))
        arrays = row_arrays(rows, readouts, self.model.config)
        found = self.passes.run(arrays, np.array(numbers, np.int32), logit_rows)
        tokens: list[int] = found.tokens.tolist()
        for readout, token in zip(predicting, tokens, strict=False):
            if token == NO_TOKEN and readout.is_final:
                faults[readout.sequence] = not_a_number(readout.position, math.nan)
        if asked.chosen:
            chosen = self.passes.choose(found.logits, logit_rows[asked.chosen], asked.choices.array)
            for index, token in zip(asked.chosen, chosen.tolist(), strict=True):
                tokens[index] = token
        # A draft of nothing: the last word will say so.
        predicted = [max(0, token) for token in tokens[: len(predicting)]]
        if not (asked.scored or scoring):
            return PassResult(predicted, {}, [], faults)
        for prompt, token in _scored_rows(scoring, tokens[len(predicting) :]):
            if token == NO_TOKEN:
                faults[prompt.sequence] = not_a_number(prompt.start, math.nan)
        return PassResult(
            predicted, *self._scores(found.logits, logit_rows, asked, readouts, predicted), faults
        )

    def _scores(
        self, logits: Floats, logit_rows: Ints, asked: Asked, readouts: Readouts, predicted: list[int]
    ) -> tuple[dict[int, TokenLogprobs], list[list[TokenLogprobs]]]:
        """Scores of predicted tokens by the readouts' indices, and of each prompt's tokens."""
        predicting, scoring = readouts
        tokens = [predicted[index] for index in asked.scored]
        num_tops = [predicting[index].sequence.request.logprobs or 0 for index in asked.scored]
        for prompt in scoring:
            tokens.extend(prompt.token_ids)
            num_tops.extend([prompt.sequence.request.prompt_logprobs or 0] * prompt.num_rows)
        rows = logit_rows[[*asked.scored, *range(len(predicting), len(logit_rows))]]
        scores = self.passes.score(logits, rows, np.array(tokens, np.int32), max(num_tops)).listed(num_tops)
        of_tokens, of_prompts = (
            dict(zip(asked.scored, scores, strict=False)),
            iter(scores[len(asked.scored) :]),
        )
        return of_tokens, [list(islice(of_prompts, prompt.num_rows)) for prompt in scoring]


def _logit_rows(asked: Asked, num_predicting: int, num_rows: int) -> Ints:
    """Where the logits of each readout go, -1 where the likeliest token is all that is asked for."""
    rows = np.full(num_rows, -1, np.int32)
    wanted = sorted({*asked.chosen, *asked.scored})
    if not wanted and num_rows == num_predicting:
        return rows
    rows[wanted] = np.arange(len(wanted))
    rows[num_predicting:] = np.arange(len(wanted), len(wanted) + num_rows - num_predicting)
    return rows


def _scored_rows(scoring: list[PromptReadout], tokens: list[int]) -> abc.Iterator[tuple[PromptReadout, int]]:
    """The prompt of each row that scores one, and the likeliest token there."""
    return zip((prompt for prompt in scoring for _ in range(prompt.num_rows)), tokens, strict=True)


def row_arrays(rows: Rows, readouts: Readouts, config: LoopedConfig) -> RowArrays:
    """The rows of a pass as the library reads them."""
    positions: list[int] = []
    loops: list[int] = []
    tables: list[int] = []
    pages: list[int] = []
    first_page: dict[int, int] = {}
    ends = bytearray(len(rows))
    for (table, start, num_rows, loop, _), is_last in zip(rows.runs, rows.ends_loops, strict=True):
        page = first_page.get(id(table))
        if page is None:
            page = first_page[id(table)] = len(pages)
            pages.extend(table.pages)
        if is_last:
            ends[len(positions) : len(positions) + num_rows] = b"\1" * num_rows
        positions.extend(range(start, start + num_rows))
        loops.extend([loop] * num_rows)
        tables.extend([page] * num_rows)
    for readout in readouts.predicting:
        ends[readout.row] = 1
    tokens = [0] * len(positions)
    for row, token in zip(rows.entering_rows, rows.tokens, strict=True):
        tokens[row] = token
    columns = np.array((tokens, positions, loops, tables), np.int32)
    noises, noise = _noise(rows, config)
    return RowArrays(
        tokens=columns[0],
        positions=columns[1],
        loops=columns[2],
        tables=columns[3],
        pages=np.array(pages, np.int32),
        ends=np.frombuffer(ends, np.uint8),
        noises=noises,
        noise=noise,
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
