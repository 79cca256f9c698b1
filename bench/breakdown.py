"""Where a pass goes: matrix products, attention, other tensor work, Python.

Timers around the tensor work of a pass, without a profiler: what is left is our own Python (scheduler, wave,
the backend's bookkeeping). The native library says itself which of its parts take how long. Of torch's
passes the same requests are measured again by torch's profiler, whose top-level operators are sorted by
name; the rest of its wall time is all Python, nn.Module's calls and the profiler's own cost included: an
upper bound.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from model.engine import Engine
from model.passes.native.backend import NativeBackend, NativePasses
from model.passes.torch.backend import TorchBackend
from model.protocol import GenerationRequest

MATRIX = ("linear", "matmul", "mm", "addmm")
ATTENTION = ("scaled_dot_product_attention", "_scaled_dot_product")
TENSOR_WORK = ("angles", "enter", "loop", "finish", "head")  # of the model
LIBRARY_CALLS = ("speed_run", "speed_choose", "speed_score")

P = ParamSpec("P")
T = TypeVar("T")


class Breakdown(NamedTuple):
    """Microseconds a pass without a profiler, and shares of the wall time under the profiler."""

    pass_us: float
    own_python_us: float
    matrix_share: float
    attention_share: float
    other_tensor_share: float
    python_share: float

    @property
    def own_python_share(self) -> float:
        """Scheduler, wave and bookkeeping as a share of a pass, measured without the profiler."""
        return self.own_python_us / self.pass_us

    def __str__(self) -> str:
        shares = (self.matrix_share, self.attention_share, self.other_tensor_share, self.python_share)
        names = ("matrix products", "attention", "other tensor work", "all Python (upper bound)")
        parts = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares, strict=True))
        own = f"{self.own_python_us:.0f} us, {self.own_python_share:.1%}"
        return f"a pass takes {self.pass_us:.0f} us: {parts}\nscheduler, wave and bookkeeping: {own}"


class LibraryBreakdown(NamedTuple):
    """Microseconds a pass of the native library: in all, outside of the library, and in its parts."""

    pass_us: float
    own_python_us: float
    parts_us: dict[str, float]

    @property
    def own_python_share(self) -> float:
        """Scheduler, wave and bookkeeping as a share of a pass."""
        return self.own_python_us / self.pass_us

    def __str__(self) -> str:
        parts = {**self.parts_us, "scheduler, wave and bookkeeping": self.own_python_us}
        lines = (f"{us:8.0f} us {us / self.pass_us:6.1%}  {name}" for name, us in parts.items())
        return "\n".join([f"a pass takes {self.pass_us:.0f} us:", *lines])


def break_down(engine: Engine, requests: list[GenerationRequest]) -> Breakdown | LibraryBreakdown:
    """Runs the requests, those of torch twice, and says where the passes went."""
    if isinstance(engine.backend, NativeBackend):
        return _of_library(engine, engine.backend.passes, requests)
    assert isinstance(engine.backend, TorchBackend)
    tensor_work = [(engine.model, name) for name in TENSOR_WORK]
    taken = _timed(engine, requests, [*tensor_work, (engine.backend.sampler, "sample")])
    return Breakdown(taken.pass_us, taken.outside_us, *_profiled(engine, requests))


def _of_library(engine: Engine, passes: NativePasses, requests: list[GenerationRequest]) -> LibraryBreakdown:
    passes.times()  # of earlier passes
    taken = _timed(engine, requests, [(passes.library, name) for name in LIBRARY_CALLS])
    parts = {part: seconds / taken.passes * 1e6 for part, seconds in passes.times().items() if seconds}
    inside = taken.pass_us - taken.outside_us
    parts["choosing tokens; waking threads and waiting for them"] = inside - sum(parts.values())
    return LibraryBreakdown(taken.pass_us, taken.outside_us, parts)


class _Stopwatch:
    """Adds up the time inside the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[P, T]) -> Callable[P, T]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            return result

        return timed


class _Taken(NamedTuple):
    """What passes took: their number, seconds in all, and those within the methods that were timed."""

    passes: int
    seconds: float
    inside: float

    @property
    def pass_us(self) -> float:
        return self.seconds / self.passes * 1e6

    @property
    def outside_us(self) -> float:
        return (self.seconds - self.inside) / self.passes * 1e6


def _timed(engine: Engine, requests: list[GenerationRequest], methods: list[tuple[object, str]]) -> _Taken:
    watch, passes = _Stopwatch(), 0
    before = [vars(owner).get(name) for owner, name in methods]
    for owner, name in methods:  # found before the class's methods and nn.Module's children
        vars(owner)[name] = watch.around(getattr(owner, name))
    try:
        for request in requests:
            engine.add(request)
        started = time.perf_counter()
        while engine.has_requests:
            engine.step()
            passes += 1
        wall = time.perf_counter() - started
    finally:
        for (owner, name), value in zip(methods, before, strict=True):
            del vars(owner)[name]
            if value is not None:  # a function of a library, with the types that it was given
                vars(owner)[name] = value
    return _Taken(passes, wall, watch.seconds)


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
