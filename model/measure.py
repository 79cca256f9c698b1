"""Measures what a pass costs on this machine: the scheduler's ground for widening or narrowing waves.

Runs passes of made-up sequences over the engine's own runner and pool, before any request: one row a
sequence, then whole waves, over a grid of sequences x context. The shortest of a few runs counts, so a
busy moment of the machine doesn't. Kept in a file per model, machine and options, so that the next start
doesn't measure again.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import msgspec
import torch

from model.cache import PrefixKeys
from model.cost import MeasuredCost, PassPrice
from model.drafts import make_policy
from model.engine import Engine
from model.protocol import GenerationRequest, SamplingParams
from model.sequence import ScheduledRun, Sequence
from model.wave import Wave

SECONDS = 4.0  # for the whole measurement
REPEATS = 4
SEQUENCES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 512)  # tokens
WAVE_ROWS = 4  # of a sequence in the passes that are compared
OWN_MILLISECONDS = 0.03  # of scheduler and wave for a row: pure Python, outside of the passes measured here
MOST_ROWS = 256  # of a pass that still takes speculative ones


class _Kept(msgspec.Struct):
    """A measurement as it is kept in its file."""

    num_sequences: list[int]
    contexts: list[int]
    prices: list[list[tuple[float, float]]]
    draw: float


def measured_cost(engine: Engine) -> MeasuredCost:
    """The engine's pass costs, from the file of an earlier start or measured now (a few seconds)."""
    file = _file(engine)
    kept = _read(file)
    if kept is None:
        kept = _measure(engine)
        _write(file, kept)
    prices = [[PassPrice(*price) for price in row] for row in kept.prices]
    return MeasuredCost(kept.num_sequences, kept.contexts, prices, MOST_ROWS, kept.draw)


def _measure(engine: Engine) -> _Kept:
    most = min(engine.scheduler.limits.max_num_seqs, SEQUENCES[-1])
    room = engine.pool.num_tokens
    longest = engine.max_model_len - engine.model.config.num_loops
    contexts = [context for context in CONTEXTS if context <= longest] or [max(1, longest)]
    kept, started = _Kept([], contexts, [], _draw_price(engine)), perf_counter()
    for num in SEQUENCES:
        fits = num * (contexts[-1] + engine.pool.page_size + engine.model.config.num_loops) <= room
        if kept.prices and (num > most or not fits or perf_counter() - started > SECONDS / 2):
            break
        kept.num_sequences.append(num)
        kept.prices.append([_price(engine, num, context) for context in contexts])
    return kept


def _price(engine: Engine, num_sequences: int, context: int) -> tuple[float, float]:
    """Milliseconds of a pass of one row a sequence, and of each further row of their waves."""
    loops = engine.model.config.num_loops
    width = min(loops, WAVE_ROWS) if loops > 1 else WAVE_ROWS
    sequences = [_sequence(engine, context + width) for _ in range(num_sequences)]
    single = [ScheduledRun(seq, context, 1, loops - 1, 1) for seq in sequences]
    if loops > 1:
        waves = [
            ScheduledRun(seq, context + width - 1 - i, 1, i, 1) for seq in sequences for i in range(width)
        ]
    else:
        waves = [ScheduledRun(seq, context, width, 0, width) for seq in sequences]
    try:
        base, whole = _shortest(engine, single), _shortest(engine, waves)
    finally:
        for sequence in sequences:
            assert sequence.table is not None
            engine.pool.free(sequence.table)
    return base, OWN_MILLISECONDS + max(0.0, whole - base) / (num_sequences * (width - 1))


def _draw_price(engine: Engine) -> float:
    """Milliseconds by which a row costs more if its token is sampled: noise and filters.

    Each pass draws at other positions, as decoding does: noise is kept for a while.
    """
    length = WAVE_ROWS * (REPEATS + 3)
    if length >= engine.max_model_len:
        return 0.0
    seconds = []
    for temperature in (0.0, 1.0):
        sequence = _sequence(engine, length, temperature)
        starts = range(0, length - WAVE_ROWS, WAVE_ROWS)
        loop = engine.model.config.num_loops - 1
        batches = [[ScheduledRun(sequence, start, WAVE_ROWS, loop, WAVE_ROWS)] for start in starts]
        seconds.append(min(_once(engine, batch) for batch in batches))
        assert sequence.table is not None
        engine.pool.free(sequence.table)
    return max(0.0, seconds[1] - seconds[0]) * 1000 / WAVE_ROWS


def _once(engine: Engine, batch: list[ScheduledRun]) -> float:
    started = perf_counter()
    engine.runner.forward(batch)
    return perf_counter() - started


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
    sequence.table = engine.pool.open([], length, length)
    assert sequence.table is not None
    return sequence


def _shortest(engine: Engine, batch: list[ScheduledRun]) -> float:
    return min(_times(engine, batch)) * 1000


def _times(engine: Engine, batch: list[ScheduledRun]) -> Iterator[float]:
    """Seconds of a few runs; of one alone if that takes long."""
    engine.runner.forward(batch)  # chooses kernels, maps memory
    for _ in range(REPEATS):
        started = perf_counter()
        engine.runner.forward(batch)  # ends with the tokens on the host: the device has finished
        seconds = perf_counter() - started
        yield seconds
        if seconds > SECONDS / 40:
            return


def _file(engine: Engine) -> Path:
    """Named after everything that a pass time depends on."""
    info = engine.info
    device = torch.cuda.get_device_name(engine.model.device) if info.device != "cpu" else _processor()
    facts = [engine.model.config, info.dtype, device, torch.get_num_threads(), torch.__version__]
    kinds = sorted({type(module).__name__ for module in engine.model.modules()})  # packed, quantised, ...
    facts += [engine.max_model_len, info.max_num_seqs, kinds, SEQUENCES, CONTEXTS]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "speed-serve" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.json"


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else ''} {len(os.sched_getaffinity(0))}"


def _read(file: Path) -> _Kept | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None


def _write(file: Path, kept: _Kept) -> None:
    """Best effort: a read-only home is no reason not to serve."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(msgspec.to_builtins(kept)))
        part.replace(file)
    except OSError:
        pass
