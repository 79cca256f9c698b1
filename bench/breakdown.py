"""Where a pass goes: matrix products, attention, other tensor work, Python.

Two measurements of the same requests. Plain timers around the scheduler's halves, without a profiler;
and torch's profiler, whose top-level operators are sorted by name, the rest of the wall time being
Python (the scheduler, the runner's bookkeeping, nn.Module calls and the profiler's own cost: an upper
bound).
"""

import time
from typing import NamedTuple

import torch

from model.engine import Engine
from model.protocol import GenerationRequest

MATRIX = ("linear", "matmul", "mm", "addmm", "_linear_pointwise")
ATTENTION = ("scaled_dot_product_attention", "_scaled_dot_product")


class Breakdown(NamedTuple):
    """Microseconds a pass without a profiler, and shares of the wall time under the profiler."""

    pass_us: float
    schedule_us: float
    update_us: float
    matrix_share: float
    attention_share: float
    other_tensor_share: float
    python_share: float

    @property
    def bookkeeping_share(self) -> float:
        """Scheduler and wave as a share of a pass, measured without the profiler."""
        return (self.schedule_us + self.update_us) / self.pass_us

    def __str__(self) -> str:
        shares = (self.matrix_share, self.attention_share, self.other_tensor_share, self.python_share)
        names = ("matrix products", "attention", "other tensor work", "Python (upper bound)")
        parts = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares, strict=True))
        return (
            f"a pass takes {self.pass_us:.0f} us: {parts}\n"
            f"scheduler and wave: {self.schedule_us + self.update_us:.0f} us, {self.bookkeeping_share:.1%}"
        )


def break_down(engine: Engine, requests: list[GenerationRequest]) -> Breakdown:
    """Runs the requests twice and says where the passes went."""
    pass_us, schedule_us, update_us = _timed(engine, requests)
    return Breakdown(pass_us, schedule_us, update_us, *_profiled(engine, requests))


def _timed(engine: Engine, requests: list[GenerationRequest]) -> tuple[float, float, float]:
    scheduler, clock = engine.scheduler, time.perf_counter
    schedule = update = 0.0
    passes = 0
    started = clock()
    for request in requests:
        engine.add(request)
    while scheduler.has_work:
        before = clock()
        batch = scheduler.schedule()
        planned = clock()
        tokens = engine.runner.forward(batch)
        ran = clock()
        scheduler.update(batch, tokens)
        schedule += planned - before
        update += clock() - ran
        passes += 1
    wall = clock() - started
    return wall / passes * 1e6, schedule / passes * 1e6, update / passes * 1e6


def _profiled(engine: Engine, requests: list[GenerationRequest]) -> tuple[float, float, float, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.perf_counter()
        engine.run(requests)
        wall = (time.perf_counter() - started) * 1e6
    matrix = attention = other = 0.0
    for event in profile.events():
        if event.cpu_parent is not None:
            continue
        name = event.name.rpartition("::")[2]
        if name.startswith(MATRIX):
            matrix += event.cpu_time_total
        elif name.startswith(ATTENTION):
            attention += event.cpu_time_total
        else:
            other += event.cpu_time_total
    return matrix / wall, attention / wall, other / wall, 1 - (matrix + attention + other) / wall
