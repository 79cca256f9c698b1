"""Passes by the native library: arrays of rows in, tokens and logits out.

`NativePasses` knows arrays alone; `NativeBackend` makes them of a pass's rows and of what its readouts ask.
Invariant: a row's logits, and what is chosen and scored by them, have the same bits whatever else is in its
pass, however many threads run, and whatever passes came before.
"""

import ctypes
import math
import os
import weakref
from array import array
from collections import abc
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.network.config import LoopedConfig
from model.network.looped import LoopedTransformer
from model.options import KVCacheDtypeName
from model.passes.backend import BackendFacts, CacheBytes
from model.passes.kv import KV_DTYPES, head_bytes
from model.passes.native import structs
from model.passes.native.choosing import Asked, Scores
from model.passes.native.library import NativeUnavailableError, choose, load
from model.passes.native.loops import AskedLoops, ExitGate, HeadRows
from model.passes.native.weights import PackedModel, allocate
from model.passes.noise import state_noise
from model.passes.rows import Rows
from model.passes.scores import not_a_number
from model.protocol import TokenLogprobs
from model.schedule.batch import PassResult, PromptReadout, Readouts
from model.schedule.sequence import Sequence
from model.schedule.source import Source

SPIN_MICROSECONDS = 100  # that a thread waits for others before it sleeps
NO_TOKEN = -1
_ERROR_BYTES = 300

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Numbers = abc.Sequence[int] | Ints


@dataclass(frozen=True)
class NativeOptions:
    """How a model is held and run. `threads` 0: as many as the process may use."""

    threads: int = 0
    kv_dtype: KVCacheDtypeName = "auto"  # float16
    int4: bool = False  # linear layers in int4
    frees: bool = False  # the model's matrices as they are packed: it can compute nothing any more
    level: str | None = None  # of CPU instructions; None: the best
    spin_microseconds: int = SPIN_MICROSECONDS

    @property
    def name(self) -> str:
        """The backend's name, as its facts have it."""
        return "native"

    def cache_bytes(self, model: LoopedTransformer) -> CacheBytes:
        """What a token takes of the cache. The model needs no weights."""
        config, dtype = model.config, KV_DTYPES[self.held_in]
        padded = -(-config.head_dim // structs.BLOCK) * structs.BLOCK  # of a value
        both = head_bytes(config.head_dim, dtype) + head_bytes(padded, dtype)
        return CacheBytes(config.kv_heads_per_token // 2 * both, _state_numbers(config) * 4, self.held_in)

    @property
    def held_in(self) -> KVCacheDtypeName:
        """What K and V are held in."""
        return "float16" if self.kv_dtype == "auto" else self.kv_dtype

    @property
    def kv_type(self) -> structs.KVType:
        """The same as the library has it."""
        return structs.KVType[self.held_in.upper()]

    def make(self, model: LoopedTransformer, num_tokens: int, max_positions: int) -> "NativeBackend":
        """A backend of the model. Raises NativeUnavailableError where the library doesn't cover it."""
        return NativeBackend(model, num_tokens, max_positions, self)


def _state_numbers(config: LoopedConfig) -> int:
    """What a position keeps between two passes: its state, and the block's input if loops read it."""
    return config.state_size + (config.hidden_size if config.keeps_input else 0)


class RowArrays(NamedTuple):
    """The rows of a pass, one entry a row but for `pages` and `noise`; lists or arrays of whole numbers.

    Row i stands at `positions[i]` of the sequence whose page numbers are in `pages` from `tables[i]` on, and
    does loop `loops[i]` (0..R-1); in its first one it reads `tokens[i]`. With `ends[i]` the coda runs behind
    the loop, as it must for rows that are read out. `noises[i]` is the row of `noise` (n, hidden) that its
    state starts from, or -1. It sees all up to `lasts[i]`, its own position by default; behind an encoder
    also its source up to `source_lasts[i]`, whose page numbers are in `pages` from `source_tables[i]` on.
    Rows that are a source's own tokens are `encoded`: they go through the encoder, and what the decoder's
    layers read of them is stored on their pages.
    """

    tokens: Numbers
    positions: Numbers
    loops: Numbers
    tables: Numbers
    pages: Numbers
    ends: bytearray | NDArray[np.uint8]
    noises: Numbers | None = None
    noise: Floats | None = None
    lasts: Numbers | None = None
    source_tables: Numbers | None = None
    source_lasts: Numbers | None = None
    encoded: bool = False


class NativeResult(NamedTuple):
    """The likeliest token of every readout, and the logits (n, vocab) of those that asked for them.

    The token is NO_TOKEN where a logit is infinite or no number. `kept` are the head's inputs (n, hidden) of
    the rows that were to be kept.
    """

    tokens: list[int]
    logits: Floats
    kept: Floats


class _Columns:
    """Whole numbers as the library reads them: lists side by side in one piece of memory."""

    def __init__(self, *columns: Numbers) -> None:
        self._numbers = array("i", chain.from_iterable(columns))
        first, _ = self._numbers.buffer_info()
        starts = accumulate(map(len, columns), initial=0)
        self.addresses = [first + start * self._numbers.itemsize for start in starts][:-1]


class NativePasses:
    """A packed model with its K/V and states. Not for two threads at once."""

    def __init__(
        self, model: LoopedTransformer, num_tokens: int, max_positions: int, options: NativeOptions
    ) -> None:
        """Raises NativeUnavailableError where there is no library or it doesn't cover the model."""
        self.level = choose(options.level)
        self.library = load(self.level)
        self.packed = PackedModel(self.library, model, max_positions, int4=options.int4, frees=options.frees)
        self.config = model.config
        self.num_threads = options.threads or len(os.sched_getaffinity(0))
        num_pages = num_tokens // structs.PAGE
        size = self.library.speed_cache_bytes(self.packed.description, num_pages, options.kv_type)
        self._cache = allocate(size)
        self._states = allocate(_state_numbers(model.config) * num_pages * structs.PAGE * 4)
        setup = structs.Setup(
            num_threads=self.num_threads,
            spin_microseconds=options.spin_microseconds,
            num_pages=num_pages,
            kv_type=options.kv_type,
            cache=self._cache.ctypes.data,
            states=self._states.ctypes.data,
        )
        self._error = ctypes.create_string_buffer(_ERROR_BYTES)
        self._engine = self.library.speed_open(self.packed.description, setup, self._error, _ERROR_BYTES)
        if not self._engine:
            raise NativeUnavailableError(self._problem())
        self._scratch = allocate(self.library.speed_scratch_bytes(self._engine))
        weakref.finalize(self, self.library.speed_close, self._engine)

    def run(
        self, rows: RowArrays, readouts: Numbers, logit_rows: Numbers, head: HeadRows | None = None
    ) -> NativeResult:
        """One pass. `readouts` are rows; `logit_rows` where each one's logits go in the result, or -1.

        A readout behind the last row reads a row of `head.given`.
        Raises ValueError, with nothing changed, for numbers that are out of range.
        """
        tokens, ends = array("i", bytes(4 * len(readouts))), array("B", bytes(rows.ends))
        num_logits = max(logit_rows, default=-1) + 1
        logits = np.empty((num_logits, self.config.vocab_size), np.float32)
        kept_rows = () if head is None else head.kept
        kept = np.empty((len(kept_rows), self.config.hidden_size), np.float32)
        optional = (rows.noises, rows.lasts, rows.source_tables, rows.source_lasts)
        columns = _Columns(
            *rows[:5], readouts, logit_rows, kept_rows, *(() if each is None else each for each in optional)
        )
        work = structs.Pass(
            len(rows.positions),
            len(rows.pages),
            len(readouts),
            num_logits,
            0 if rows.noise is None else len(rows.noise),
            len(kept_rows),
            0 if head is None else len(head.given),
            rows.encoded,
        )
        (
            work.tokens,
            work.positions,
            work.loops,
            work.tables,
            work.pages,
            work.readouts,
            work.logit_rows,
            work.kept,
            *addresses,
        ) = columns.addresses
        work.noises, work.lasts, work.source_tables, work.source_lasts = (
            None if column is None else address for column, address in zip(optional, addresses, strict=True)
        )
        work.ends, work.tokens_out = ends.buffer_info()[0], tokens.buffer_info()[0]
        if num_logits:
            work.logits = logits.ctypes.data
        if rows.noise is not None:
            work.noise = rows.noise.ctypes.data
        if head is not None:
            work.kept_out, work.given = kept.ctypes.data, head.given.ctypes.data
        if self.library.speed_run(self._engine, work, self._error, _ERROR_BYTES):
            raise ValueError(self._problem())
        return NativeResult(tokens.tolist(), logits, kept)

    def fill_cache(self, byte: int) -> None:
        """Overwrites all K/V and states, as other texts would: nothing of them may show."""
        self._cache[:] = byte
        self._states[:] = byte

    def times(self) -> dict[str, float]:
        """Seconds that each part of all passes took since the last call, by `structs.PARTS`."""
        found = (ctypes.c_int64 * len(structs.PARTS))()
        self.library.speed_times(self._engine, found)
        return {part: found[index] / 1e9 for index, part in enumerate(structs.PARTS)}

    def choose(self, logits: Floats, rows: Numbers, choices: "NDArray[np.void]") -> list[int]:
        """A token by each of these `rows` of logits (n, vocab), as `choices` (choosing.CHOICE) say.

        Raises ValueError for numbers that are out of range.
        """
        tokens, columns = array("i", bytes(4 * len(rows))), _Columns(rows)
        work = structs.Choosing(
            num_rows=len(rows),
            num_logits=len(logits),
            logits=logits.ctypes.data,
            rows=columns.addresses[0],
            choices=choices.ctypes.data,
            tokens=tokens.buffer_info()[0],
            scratch=self._scratch.ctypes.data,
        )
        if self.library.speed_choose(self._engine, work, self._error, _ERROR_BYTES):
            raise ValueError(self._problem())
        return tokens.tolist()

    def score(self, logits: Floats, rows: Numbers, tokens: Numbers, num_top: int) -> Scores:
        """What these `rows` of logits (n, vocab) say of one token each, and which are likeliest.

        Raises ValueError for numbers that are out of range.
        """
        columns, num_rows, num_top = _Columns(rows, tokens), len(rows), min(num_top, self.config.vocab_size)
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
            rows=columns.addresses[0],
            tokens=columns.addresses[1],
            logprobs=logprobs.ctypes.data,
            ranks=ranks.ctypes.data,
            top_tokens=top_tokens.ctypes.data,
            top_logprobs=top_logprobs.ctypes.data,
        )
        if self.library.speed_score(self._engine, work, self._error, _ERROR_BYTES):
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
        self._gate = ExitGate(model) if model.config.exit_gate else None
        self.facts = BackendFacts(
            name=options.name,
            device="cpu",
            dtype=str(model.dtype).removeprefix("torch."),
            is_exact=True,
            bytes_per_token=options.cache_bytes(model).per_token,
            kv_cache_dtype=options.held_in,
        )

    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """Runs one loop for every row of a pass and reads out what is asked for."""
        predicting, scoring, _ = readouts
        faults: dict[Sequence, str] = {}
        asked = Asked.of(predicting, faults)
        loops = AskedLoops.of(readouts, self.model.config.hidden_size, has_gate=self._gate is not None)
        numbers = [readout.row for readout in predicting]
        for prompt in scoring:
            numbers.extend(range(prompt.row, prompt.row + prompt.num_rows))
        numbers.extend(range(rows.num_rows, rows.num_rows + loops.num_given))
        logit_rows = _logit_rows({*asked.chosen, *asked.scored, *loops.scored}, len(predicting), len(numbers))
        if self.model.config.encoder is not None and rows.new_sources:
            self.passes.run(source_arrays(rows.new_sources), (), ())
        arrays = row_arrays(rows, readouts, self.model.config)
        found = self.passes.run(arrays, numbers, logit_rows, loops.head)
        tokens = found.tokens
        for readout, token in zip(predicting, tokens, strict=False):
            if token == NO_TOKEN and readout.is_final:
                faults[readout.sequence] = not_a_number(readout.position, math.nan)
        if asked.chosen:
            chosen_rows = [logit_rows[index] for index in asked.chosen]
            chosen = self.passes.choose(found.logits, chosen_rows, asked.choices.array)
            for index, token in zip(asked.chosen, chosen, strict=True):
                tokens[index] = token
        # A draft of nothing: the last word will say so.
        predicted = [max(0, token) for token in tokens[: len(predicting)]]
        if not (asked.scored or scoring or loops.head):
            return PassResult(predicted, {}, [], faults)
        for prompt, token in zip(_scored_rows(scoring), tokens[len(predicting) :], strict=False):
            if token == NO_TOKEN:
                faults[prompt.sequence] = not_a_number(prompt.start, math.nan)
        of_tokens, of_prompts, of_loops = self._scores(found.logits, logit_rows, asked, loops, predicted)
        return PassResult(
            predicted, of_tokens, of_prompts, faults, loops.result(found.kept, of_loops, self._gate)
        )

    def _scores(
        self, logits: Floats, logit_rows: list[int], asked: Asked, loops: AskedLoops, predicted: list[int]
    ) -> tuple[dict[int, TokenLogprobs], list[list[TokenLogprobs]], abc.Iterator[TokenLogprobs]]:
        """Scores of predicted tokens by the readouts' indices, of each prompt's tokens, and of loops."""
        predicting, scoring, _ = loops.readouts
        tokens = [predicted[index] for index in asked.scored]
        num_tops = [predicting[index].sequence.request.logprobs or 0 for index in asked.scored]
        for prompt in scoring:
            tokens.extend(prompt.token_ids)
            num_tops.extend([prompt.sequence.request.prompt_logprobs or 0] * prompt.num_rows)
        end = len(logit_rows) - loops.num_given
        rows = [*(logit_rows[index] for index in asked.scored), *logit_rows[len(predicting) : end]]
        rows += loops.logit_rows(logit_rows, logit_rows[end] if loops.num_given else 0)
        for index, num_loops in zip(loops.scored, loops.num_loops, strict=True):
            tokens.extend([predicted[index]] * num_loops)
        num_tops.extend(loops.num_tops)
        if not rows:
            return {}, [], iter(())
        scores = iter(self.passes.score(logits, rows, tokens, max(num_tops)).listed(num_tops))
        of_tokens = {index: next(scores) for index in asked.scored}
        return of_tokens, [list(islice(scores, prompt.num_rows)) for prompt in scoring], scores


def _logit_rows(asked: set[int], num_predicting: int, num_rows: int) -> list[int]:
    """Where the logits of each readout go, -1 where the likeliest token is all that is asked for."""
    rows = [-1] * num_rows
    wanted = [*sorted(asked), *range(num_predicting, num_rows)]
    for place, index in enumerate(wanted):
        rows[index] = place
    return rows


def _scored_rows(scoring: list[PromptReadout]) -> abc.Iterator[PromptReadout]:
    """The prompt of each row that scores one."""
    return (prompt for prompt in scoring for _ in range(prompt.num_rows))


def row_arrays(rows: Rows, readouts: Readouts, config: LoopedConfig) -> RowArrays:
    """The rows of a pass as the library reads them."""
    tokens: list[int] = []
    positions: list[int] = []
    loops: list[int] = []
    tables: list[int] = []
    pages, ends = array("i"), bytearray()
    last_table, first_page = None, 0
    for sequence, start, num_rows, loop, _ in rows.batch:
        table, wave = sequence.table, sequence.wave
        assert table is not None
        if table is not last_table:  # the runs of a sequence stand side by side
            last_table, first_page = table, len(pages)
            pages.extend(table.pages)
        tokens += wave.tokens[start : start + num_rows]
        positions += range(start, start + num_rows)
        loops += [loop] * num_rows
        tables += [first_page] * num_rows
        ends += bytes([loop + 1 == wave.num_loops]) * num_rows
    for readout in readouts.predicting:
        ends[readout.row] = 1
    for kept in readouts.keeping:
        ends[kept.row] = 1
    arrays = RowArrays(tokens, positions, loops, tables, pages, ends, *_noise(rows, config))
    if config.prefix_lm:
        arrays = arrays._replace(lasts=_lasts(rows))
    return arrays if config.encoder is None else _behind_sources(arrays, rows)


def _lasts(rows: Rows) -> list[int]:
    """The last position that each row sees."""
    runs = rows.runs
    return [run.end_seen(p) - 1 for run in runs for p in range(run.start, run.start + run.num_rows)]


def _behind_sources(arrays: RowArrays, rows: Rows) -> RowArrays:
    """The same rows, with the pages of what they read beside their own text."""
    pages, tables, lasts = array("i", arrays.pages), list[int](), list[int]()
    last, first_page = None, 0
    for run in rows.runs:
        source = run.source
        assert source is not None
        assert source.table is not None
        if source is not last:
            last, first_page = source, len(pages)
            pages.extend(source.table.pages)
        tables += [first_page] * run.num_rows
        lasts += [len(source.tokens) - 1] * run.num_rows
    return arrays._replace(pages=pages, source_tables=tables, source_lasts=lasts)


def source_arrays(sources: list[Source]) -> RowArrays:
    """The tokens of sources that are to be encoded: each sees all of its own source."""
    tokens: list[int] = []
    positions: list[int] = []
    tables: list[int] = []
    lasts: list[int] = []
    pages = array("i")
    for source in sources:
        assert source.table is not None
        size = len(source.tokens)
        tokens += source.tokens
        positions += range(size)
        tables += [len(pages)] * size
        lasts += [size - 1] * size
        pages.extend(source.table.pages)
    nothing = [0] * len(tokens)
    return RowArrays(
        tokens, positions, nothing, tables, pages, bytearray(len(tokens)), lasts=lasts, encoded=True
    )


def _noise(rows: Rows, config: LoopedConfig) -> tuple[Ints | None, Floats | None]:
    """Where states start from noise: its row for each row, and the noise."""
    noisy = rows.noises()
    if not noisy:
        return None, None
    places, parts, total = np.full(len(rows), -1, np.int32), list[Floats](), 0
    for first, num_rows, seed, start, scale in noisy:
        noise = state_noise(seed, start, num_rows, config.hidden_size)
        places[rows.entering[first : first + num_rows]] = np.arange(total, total + num_rows)
        parts.append((noise * (scale * config.initial_state_std)).numpy())
        total += num_rows
    return places, np.concatenate(parts)
