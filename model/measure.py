"""Measures what a pass costs on this machine: the scheduler's ground for widening or narrowing waves.

Runs passes of made-up sequences over the engine's own runner and pool, before any request: one row a
sequence, then whole waves, over a grid of sequences x context. The shortest of a few runs counts, so a
busy moment of the machine doesn't. Kept in a file per model, machine and options, so that the next start
doesn't measure again; but for a measurement that doesn't repeat, which serves until this engine ends.
"""

import hashlib
import json
import math
import os
import platform
from pathlib import Path
from time import perf_counter, thread_time

import msgspec
import torch

from model.cache import PrefixKeys
from model.cost import MeasuredCost, PassPrice, ReadoutPrice
from model.drafts import make_policy
from model.engine import Engine
from model.protocol import GenerationRequest, SamplingParams
from model.sequence import ScheduledRun, Sequence
from model.wave import Wave

SECONDS = 4.0  # for the whole measurement
REPEATS = 4
READOUT_REPEATS = 20
SEQUENCES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 512)  # tokens
WAVE_ROWS = 4  # of a sequence in the passes that are compared
OWN_MILLISECONDS = 0.03  # of scheduler and wave for a row: pure Python, outside of the passes measured here
SAME = 1.5  # times: what a price may change by within the seconds of a measurement on a quiet machine
MOST_ROWS = 256  # of a pass that still takes speculative ones


class _Kept(msgspec.Struct):
    """A measurement as it is kept in its file."""

    num_sequences: list[int]
    contexts: list[int]
    prices: list[list[tuple[float, float]]]
    readout: ReadoutPrice


def measured_cost(engine: Engine) -> MeasuredCost:
    """The engine's pass costs, from the file of an earlier start or measured now (a few seconds)."""
    file = _file(engine)
    kept = _read(file)
    if kept is None:
        kept = _measure(engine)
        if _repeats(engine, kept):
            _write(file, kept)
    prices = [[PassPrice(*price) for price in row] for row in kept.prices]
    return MeasuredCost(kept.num_sequences, kept.contexts, prices, MOST_ROWS, kept.readout)


def _measure(engine: Engine) -> _Kept:
    most = min(engine.scheduler.limits.max_num_seqs, SEQUENCES[-1])
    room = engine.pool.num_tokens
    longest = engine.max_model_len - engine.model.config.num_loops
    contexts = [context for context in CONTEXTS if context <= longest] or [max(1, longest)]
    kept, started = _Kept([], contexts, [], _readout_price(engine)), _now(engine)
    for num in SEQUENCES:
        fits = num * (contexts[-1] + engine.pool.page_size + engine.model.config.num_loops) <= room
        if kept.prices and (num > most or not fits or _now(engine) - started > SECONDS / 2):
            break
        kept.num_sequences.append(num)
        kept.prices.append([_price(engine, num, context, kept.readout.head) for context in contexts])
    return kept


def _repeats(engine: Engine, kept: _Kept) -> bool:
    """Whether the first price comes out again at the end, as it does unless something else has the cores."""
    before, _ = kept.prices[0][0]
    now, _ = _price(engine, kept.num_sequences[0], kept.contexts[0], kept.readout.head)
    return max(now, before) <= SAME * min(now, before)


def _price(engine: Engine, num_sequences: int, context: int, head: float) -> tuple[float, float]:
    """Milliseconds of a pass of one row a sequence, not read out, and of each further row of their waves."""
    loops = engine.model.config.num_loops
    width = min(loops, WAVE_ROWS) if loops > 1 else WAVE_ROWS
    sequences = [_sequence(engine, context + width) for _ in range(num_sequences)]
    single = [ScheduledRun(seq, context, 1, loops - 1, 0) for seq in sequences]
    if loops > 1:
        waves = [
            ScheduledRun(seq, context + width - 1 - i, 1, i, 1) for seq in sequences for i in range(width)
        ]
    else:
        waves = [ScheduledRun(seq, context, width, 0, width) for seq in sequences]
    try:
        base, whole = _shortest(engine, [single, waves])
    finally:
        for sequence in sequences:
            assert sequence.table is not None
            engine.pool.free(sequence.table)
    return base, OWN_MILLISECONDS + max(0.0, whole - base - head) / (num_sequences * (width - 1))


def _readout_price(engine: Engine) -> ReadoutPrice:
    """What the head costs a pass, and sampling a readout.

    Noise is not counted: it depends on the position alone, so the last depth finds that of the drafts.
    """
    if engine.max_model_len <= WAVE_ROWS:
        return ReadoutPrice()
    loop = engine.model.config.num_loops - 1
    sequences = [_sequence(engine, WAVE_ROWS, temperature) for temperature in (0.0, 1.0)]
    batches = [
        [ScheduledRun(sequence, 0, WAVE_ROWS, loop, num_readouts)]
        for sequence in sequences
        for num_readouts in (0, 1, WAVE_ROWS)
    ]
    bare, one, several, _, drawn_one, drawn_several = _shortest(engine, batches, READOUT_REPEATS)
    for sequence in sequences:
        assert sequence.table is not None
        engine.pool.free(sequence.table)
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
    sequence.table = engine.pool.open([], length, length)
    assert sequence.table is not None
    return sequence


def _shortest(engine: Engine, batches: list[list[ScheduledRun]], repeats: int = REPEATS) -> list[float]:
    """Milliseconds of each batch, the least of a few runs in turn: their differences are prices."""
    for batch in batches:
        engine.runner.forward(batch)  # chooses kernels, maps memory
    best = [math.inf] * len(batches)
    for _ in range(repeats):
        seconds = [_once(engine, batch) for batch in batches]
        best = list(map(min, best, seconds))
        if sum(seconds) > SECONDS / 20:
            break  # passes so long are hardly disturbed
    return [1000 * each for each in best]


def _once(engine: Engine, batch: list[ScheduledRun]) -> float:
    """Seconds of a pass."""
    started = _now(engine)
    engine.runner.forward(batch)
    return _now(engine) - started


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
