"""Measures what a pass costs on this machine: the scheduler's ground for widening or narrowing waves.

Runs passes of made-up sequences over the engine's own backend and pool, while no request runs: one row a
sequence, then whole waves, over a grid of sequences x context, and chunks of prompts. The shortest of several
rounds counts, and what the rounds differ by says how far that can be believed. Kept in a file per model,
machine and options, so that the next start doesn't measure again. Invariant: prices that were disturbed, or
that later passes contradict, are never kept: they serve until the engine is idle and measures again.
"""

import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Generator
from copy import copy
from pathlib import Path
from time import monotonic, perf_counter, thread_time
from typing import NamedTuple, TypeVar

import msgspec
import torch

from model.engine import Engine
from model.machine import cache_folder, processor, usable_cores
from model.protocol import GenerationRequest, SamplingParams
from model.schedule.batch import ScheduledRun
from model.schedule.cost import MeasuredCost, PassPrice, PromptPrice, ReadoutPrice, speculates_alone
from model.schedule.drafts import make_policy
from model.schedule.pages import PrefixKeys
from model.schedule.sequence import Sequence
from model.schedule.source import Source
from model.schedule.watch import PassWatch
from model.schedule.wave import Wave

log = logging.getLogger(__name__)

T = TypeVar("T")
Steps = Generator[None, None, T]  # a measurement that stops after every pass, and may be given up there

SECONDS = 4.0  # for the whole measurement
LEAST_ROUNDS, ROUNDS, MOST_ROUNDS = 2, 4, 12  # after the first, which chooses kernels and maps memory
READOUT_ROUNDS = 20
SEQUENCES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 512)  # tokens
PROMPT_CONTEXTS = (0, 1024)  # tokens before the chunk of a prompt that is measured
SCORED_TOP = 1  # log-probabilities beside that of the prompt's own token, where rows that score are measured
WAVE_ROWS = 4  # of a sequence in the passes that are compared
OWN_MILLISECONDS = 0.03  # of scheduler and wave for a row: pure Python, outside of the passes measured here
SAME = 1.5  # times: what a pass may take more than the shortest of its kind on a quiet machine
MOST_ROWS = 256  # of a pass that still takes speculative ones
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0  # seconds before prices that are doubted are measured again


class PriceKeeper:
    """The prices of an engine's passes, from their file or measured; see schedule.watch.PriceKeeper.

    Sets the engine's cost of passes when it is made, within a few seconds, and when it has measured again.
    """

    def __init__(self, engine: Engine, told: bytes = b"") -> None:
        """`told` are the prices of a worker before this one on this machine, as `packed` gives them."""
        self._engine, self._file = engine, _file(engine)
        self._watch = PassWatch()
        self._renewal: Steps[None] | None = None
        self._pause = FIRST_PAUSE
        self._not_before = monotonic() + self._pause
        self._use(_unpacked(told) or self._first())

    def _first(self) -> "_Kept":
        """The prices in the file, unless the first passes contradict them; else measured ones."""
        kept = _read(self._file)
        if kept is not None and _finish(_is_contradicted(_Stopwatch(self._engine), kept)):
            log.warning(
                "the pass prices in %s are not those of this machine: they are measured again", self._file
            )
            kept = None
        if kept is None:
            kept = _finish(_measure(_Stopwatch(self._engine)))
            _write(self._file, kept)
        return kept

    @property
    def packed(self) -> bytes:
        """The present prices, doubted ones too, for a worker after this one."""
        return msgspec.json.encode(self._kept)

    @property
    def is_due(self) -> bool:
        """Whether prices are in doubt, for so long that they should be measured again."""
        return self._renewal is not None or (self._is_doubtful and monotonic() >= self._not_before)

    def note(self, expected: float, took: float) -> None:
        """A pass took so many milliseconds, where so many were expected, of the main thread's CPU time."""
        if self._engine.model.device.type == "cpu":  # elsewhere a pass may end before its device does
            self._watch.note(expected, took)

    def work(self) -> None:
        """Runs one pass of a measurement, beginning one if it is due."""
        if not self.is_due:
            return
        if self._renewal is None:
            self._renewal = self._renewed()
        try:
            next(self._renewal)
        except StopIteration:
            self._renewal = None

    def pause(self) -> None:
        """Gives up a measurement that has begun."""
        if self._renewal is not None:
            self._renewal.close()
            self._renewal = None

    @property
    def _is_doubtful(self) -> bool:
        return self._watch.is_doubtful or not self._kept.is_quiet

    def _renewed(self) -> Steps[None]:
        kept = yield from _measure(_Stopwatch(self._engine))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._not_before = monotonic() + self._pause
        self._watch.reset()
        _write(self._file, kept)
        if kept.is_quiet or not self._kept.is_quiet:
            self._use(kept)

    def _use(self, kept: "_Kept") -> None:
        """The engine's passes cost so much from now on."""
        engine, before = self._engine, speculates_alone(self._engine.scheduler.cost)
        self._kept = kept
        engine.scheduler.cost = kept.cost()
        single = engine.scheduler.cost.price(1, kept.contexts[0])
        found = f"a pass takes {single.base:.1f} ms, a further row {single.row:.2f} ms more"
        doubt = (
            "" if kept.is_quiet else "; the machine was busy, so that they are measured again when it is idle"
        )
        if not speculates_alone(engine.scheduler.cost) and engine.draft_policy != "none":
            log.warning("speculation is off, by measured prices of passes: %s%s", found, doubt)
        elif not kept.is_quiet or not before:
            log.warning("speculation is on, by measured prices of passes: %s%s", found, doubt)


class _Kept(msgspec.Struct):
    """A measurement as it is kept in its file; `noise` is how many times runs of the same passes differed."""

    num_sequences: list[int]
    contexts: list[int]
    prices: list[list[tuple[float, float]]]
    readout: ReadoutPrice
    prompt: PromptPrice
    noise: float

    @property
    def is_quiet(self) -> bool:
        """Whether the figures can be believed."""
        return self.noise <= SAME

    def cost(self) -> MeasuredCost:
        """The measured prices as the scheduler asks for them."""
        prices = [[PassPrice(*price) for price in row] for row in self.prices]
        return MeasuredCost(
            self.num_sequences, self.contexts, prices, MOST_ROWS, readout=self.readout, prompt=self.prompt
        )


class _Timing(NamedTuple):
    """The two shortest runs of a batch in milliseconds of the device's clock, and the least on the wall."""

    best: float = math.inf
    second: float = math.inf
    wall: float = math.inf

    def with_run(self, took: float, wall: float) -> "_Timing":
        first, second = sorted((self.best, self.second, took))[:2]
        return _Timing(first, second, min(self.wall, wall))

    @property
    def noise(self) -> float:
        """How many times the shortest run differs from the next, or from the time that passed meanwhile."""
        return max(self.second, self.wall) / max(self.best, 1e-6)


class _Stopwatch:
    """Times passes for one measurement. `noise` is the worst of all that it has timed, 1.0 at best."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.noise = 1.0

    def shortest(self, batches: list[list[ScheduledRun]], rounds: int = ROUNDS) -> Steps[list[float]]:
        """Milliseconds of each batch, the least of several rounds: their differences are prices.

        Rounds go on, up to a limit, until the least has nearly come twice; then it was not disturbed.
        """
        for batch in batches:
            self.engine.run_pass(batch)
            yield
        started = perf_counter()
        timings = [_Timing()] * len(batches)
        for number in range(1, max(rounds, MOST_ROUNDS) + 1):
            for index, batch in enumerate(batches):
                timings[index] = timings[index].with_run(*self._once(batch))
                yield
            noise = max(timing.noise for timing in timings)
            is_late = perf_counter() - started > SECONDS / 8
            if number >= LEAST_ROUNDS and (is_late or (number >= rounds and noise <= SAME)):
                break
        self.noise = max(self.noise, *(timing.noise for timing in timings))
        return [timing.best for timing in timings]

    def _once(self, batch: list[ScheduledRun]) -> tuple[float, float]:
        """Milliseconds of a pass, by the device's clock and by the one on the wall."""
        started, started_wall = _now(self.engine), perf_counter()
        self.engine.run_pass(batch)
        return 1000 * (_now(self.engine) - started), 1000 * (perf_counter() - started_wall)


def _finish(steps: Steps[T]) -> T:
    """What a measurement comes to, without a stop."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _measure(watch: _Stopwatch) -> Steps[_Kept]:
    engine = watch.engine
    most = min(engine.scheduler.limits.max_num_seqs, SEQUENCES[-1])
    room = engine.pool.num_tokens
    longest = engine.max_model_len - engine.model.config.num_loops
    contexts = [context for context in CONTEXTS if context <= longest] or [max(1, longest)]
    readout, prompt = (yield from _readout_price(watch)), (yield from _prompt_price(watch))
    kept, started = _Kept([], contexts, [], readout, prompt, 1.0), perf_counter()
    # A page that isn't full, and that of a source.
    num_extra = engine.pool.page_size * (1 if engine.model.config.encoder is None else 2)
    for num in SEQUENCES:
        fits = num * (contexts[-1] + num_extra + engine.model.config.num_loops) <= room
        if kept.prices and (num > most or not fits or perf_counter() - started > SECONDS / 2):
            break
        row = []
        for context in contexts:
            row.append((yield from _price(watch, num, context, readout.head)))
        kept.num_sequences.append(num)
        kept.prices.append(row)
    again = yield from _price(watch, kept.num_sequences[0], contexts[0], readout.head)
    kept.noise = max(watch.noise, _ratio(again[0], kept.prices[0][0][0]))
    return kept


def _is_contradicted(watch: _Stopwatch, kept: _Kept) -> Steps[bool]:
    """Whether the first pass and the first wave take clearly less than what is kept says.

    Less alone, and in any moment: whatever else runs on the machine can only add to what passes take.
    """
    base, row = kept.prices[0][0]
    now = yield from _price(watch, kept.num_sequences[0], kept.contexts[0], kept.readout.head)
    rows = _wave_rows(watch.engine) - 1
    return base > SAME * now[0] or base + rows * row > SAME * (now[0] + rows * now[1])


def _ratio(one: float, other: float) -> float:
    return max(one, other) / max(min(one, other), 1e-6)


def _wave_rows(engine: Engine) -> int:
    loops = engine.model.config.num_loops
    return min(loops, WAVE_ROWS) if loops > 1 else WAVE_ROWS


def _price(watch: _Stopwatch, num_sequences: int, context: int, head: float) -> Steps[tuple[float, float]]:
    """Milliseconds of a pass of one row a sequence, not read out, and of each further row of their waves."""
    engine, width = watch.engine, _wave_rows(watch.engine)
    loops = engine.model.config.num_loops
    sequences = [_sequence(engine, context + width) for _ in range(num_sequences)]
    single = [ScheduledRun(seq, context, 1, loops - 1, 0) for seq in sequences]
    if loops > 1:
        waves = [
            ScheduledRun(seq, context + width - 1 - i, 1, i, 1) for seq in sequences for i in range(width)
        ]
    else:
        waves = [ScheduledRun(seq, context, width, 0, width) for seq in sequences]
    try:
        base, whole = yield from watch.shortest([single, waves])
    finally:
        _free(engine, sequences)
    return base, OWN_MILLISECONDS + max(0.0, whole - base - head) / (num_sequences * (width - 1))


def _prompt_price(watch: _Stopwatch) -> Steps[PromptPrice]:
    """What a prompt's row costs: half a chunk in its first loop, half in its last, early and late in a text.

    These run the layers before and behind the loops as well: half of a row's loops do, or fewer.
    """
    engine = watch.engine
    loops, page = engine.model.config.num_loops, engine.pool.page_size
    longest = min(engine.max_model_len, engine.pool.num_tokens - page)
    chunk = max(2, min(engine.scheduler.limits.prefill_chunk_size, longest // 2))
    contexts = [context for context in PROMPT_CONTEXTS if context + chunk <= longest]
    if not contexts:
        return PromptPrice(0.0)
    half = chunk // 2
    sequence = _sequence(engine, contexts[-1] + 2 * half)
    scored = copy(sequence)  # in the same pages: there may be none for another one
    scored.request = msgspec.structs.replace(sequence.request, prompt_logprobs=SCORED_TOP)

    def chunk_at(owner: Sequence, context: int) -> list[ScheduledRun]:
        later = ScheduledRun(owner, context + half, half, 0, 0)
        return [later, ScheduledRun(owner, context, half, loops - 1, 0)]

    batches = [chunk_at(sequence, context) for context in contexts]
    try:
        *plain, with_scores = yield from watch.shortest([*batches, chunk_at(scored, 0)])
    finally:
        _free(engine, [sequence])
    early, late = plain[0] / (2 * half), plain[-1] / (2 * half)
    slope = max(0.0, late - early) / contexts[-1] if contexts[-1] else 0.0
    return PromptPrice(early, slope, max(0.0, with_scores - plain[0]) / half)


def _readout_price(watch: _Stopwatch) -> Steps[ReadoutPrice]:
    """What the head costs a pass, and sampling a readout.

    Noise is not counted: it depends on the position alone, so the last depth finds that of the drafts.
    """
    engine = watch.engine
    if engine.max_model_len <= WAVE_ROWS:
        return ReadoutPrice()
    loop = engine.model.config.num_loops - 1
    sequences = [_sequence(engine, WAVE_ROWS, temperature) for temperature in (0.0, 1.0)]
    batches = [
        [ScheduledRun(sequence, 0, WAVE_ROWS, loop, num_readouts)]
        for sequence in sequences
        for num_readouts in (0, 1, WAVE_ROWS)
    ]
    try:
        times = yield from watch.shortest(batches, READOUT_ROUNDS)
    finally:
        _free(engine, sequences)
    bare, one, several, _, drawn_one, drawn_several = times
    draw = max(0.0, drawn_several - drawn_one - several + one) / (WAVE_ROWS - 1)
    return ReadoutPrice(max(0.0, one - bare), max(0.0, drawn_one - one - draw), draw)


def _sequence(engine: Engine, length: int, temperature: float = 0.0) -> Sequence:
    request = GenerationRequest(
        request_id="measure",
        prompt_token_ids=[0] * length,
        max_tokens=1,
        sampling=SamplingParams(temperature=temperature),
    )
    loops = engine.model.config.num_loops
    wave = Wave([0] * length, loops, make_policy("none", frozenset()), length + 1)
    sequence = Sequence(request, wave, PrefixKeys("", engine.pool.page_size))
    sequence.table = engine.pool.open([], length)
    assert sequence.table is not None
    if engine.model.config.encoder is not None:
        page = engine.pool.page_size
        sequence.source = Source([0] * page, "", page, is_shared=False)
        sequence.source.open(engine.pool)
        assert sequence.source.table is not None
        sequence.source.is_written = True  # zeros take as long to read as any numbers
    return sequence


def _free(engine: Engine, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        sequence.free_tables(engine.pool)


def _now(engine: Engine) -> float:
    """Seconds of a clock that stands still while another process has the core, if the device is one.

    On two cores with six busy processes the time of day made rows of 0.15 ms 161 and heads of 0.3 ms 4.5.
    """
    if engine.model.device.type == "cpu":
        return thread_time()
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize(engine.model.device)  # a pass without readouts hasn't waited
    return perf_counter()


def _file(engine: Engine) -> Path:
    """Named after everything that a pass time depends on."""
    info = engine.info
    device = (
        torch.cuda.get_device_name(engine.model.device)
        if info.device != "cpu"
        else f"{platform.machine()} {processor()}"
    )
    facts = [engine.model.config, info.dtype, device, torch.get_num_threads(), torch.__version__]
    kinds = sorted({type(module).__name__ for module in engine.model.modules()})  # packed, quantised, ...
    facts += [engine.max_model_len, info.max_num_seqs, kinds, SEQUENCES, CONTEXTS, PROMPT_CONTEXTS]
    facts += [SCORED_TOP, info.backend, info.kv_cache_dtype, usable_cores()]
    facts += [engine.scheduler.limits.prefill_chunk_size]
    return cache_folder() / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.json"


def _read(file: Path) -> _Kept | None:
    """A measurement of an earlier start; None if there is none that can be used."""
    try:
        return _unpacked(file.read_bytes())
    except OSError:
        return None


def _unpacked(text: bytes) -> _Kept | None:
    """What `text` says; None if that is nothing that can be used."""
    try:
        kept = msgspec.json.decode(text, type=_Kept)
    except msgspec.MsgspecError:
        return None
    grid = [len(kept.contexts)] * len(kept.num_sequences)
    return kept if all(grid) and grid and list(map(len, kept.prices)) == grid else None


def _write(file: Path, kept: _Kept) -> None:
    """Keeps a measurement that was not disturbed. Best effort: a read-only home is no reason not to serve."""
    if not kept.is_quiet:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(msgspec.to_builtins(kept)))
        part.replace(file)
    except OSError:
        pass
