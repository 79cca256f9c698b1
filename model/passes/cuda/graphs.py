"""What runs a step: eagerly, or as a CUDA graph that was captured at the start.

A captured step is launched as one, where its hundreds of kernels one by one would keep the device waiting.
Invariant: both ways run the same step over the same buffers. Passes of more rows than were captured, those of
long prompts, run eagerly: there the kernels take longer than their launches.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from tqdm import tqdm

from model.passes.cuda.inputs import COLUMNS, Columns, Ints
from model.passes.cuda.passes import Done, Kind, Step

CAPTURED = (1, 2, 4, 8, 16, 32, 64, 128)  # rows of the passes that are captured


class Buffers:
    """Where the numbers of a bucket's passes lie, which never moves, and the noise of entering states."""

    def __init__(self, bucket: int, most_pages: int, hidden_size: int, device: torch.device) -> None:
        self.numbers = torch.zeros(len(COLUMNS) * bucket + most_pages, dtype=torch.int64, device=device)
        self.noise = torch.zeros(bucket, hidden_size, device=device)
        self.columns = Columns(self.numbers, bucket)

    def fill(self, numbers: Ints) -> None:
        """Takes the numbers of a pass by one copy, without a wait where memory can be pinned."""
        given = torch.from_numpy(numbers)
        if self.numbers.is_cuda:
            given = given.pin_memory()
        self.numbers[: len(numbers)].copy_(given, non_blocking=True)


class Runner(Protocol):
    """Runs the step for passes of a kind, whose numbers are in the buffers of its bucket."""

    def run(self, kind: Kind, buffers: Buffers) -> Done:
        """Runs it; the result is good until the next pass."""


class Eager:
    """Every operation is launched by itself."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def run(self, kind: Kind, buffers: Buffers) -> Done:
        """Runs the step."""
        return self._step(buffers.columns, kind, buffers.noise)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    done: Done


class Graphs:
    """A captured step for each kind of pass; those that aren't captured run eagerly."""

    def __init__(self, step: Step, buffers: Callable[[int], Buffers]) -> None:
        """Captures all kinds, which takes some seconds; a progress bar is shown on a terminal."""
        self._eager, self._captured = Eager(step), dict[Kind, _Captured]()
        self._first: torch.cuda.CUDAGraph | None = None
        for kind in tqdm(kinds(step), desc="capturing passes", unit="graph", disable=None):
            self._captured[kind] = self._capture(kind, buffers(kind.bucket))

    def run(self, kind: Kind, buffers: Buffers) -> Done:
        """Launches the graph of the kind."""
        captured = self._captured.get(kind)
        if captured is None:
            return self._eager.run(kind, buffers)
        captured.graph.replay()
        return captured.done

    def _capture(self, kind: Kind, buffers: Buffers) -> _Captured:
        # Kernels are compiled and memory is taken by a run before: a capture allows neither.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._eager.run(kind, buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # One pool for all: what a pass takes is free again when the next one runs.
        with torch.cuda.graph(graph, pool=None if self._first is None else self._first.pool()):
            done = self._eager.run(kind, buffers)
        self._first = self._first or graph
        return _Captured(graph, done)


def kinds(step: Step) -> list[Kind]:
    """All kinds of passes that are captured, large ones first: their memory serves the small ones too."""
    has_coda = step.config.num_coda_layers > 0
    parts = itertools.product((False, True), (False, True) if has_coda else (False,), (False, True))
    flags = [each for each in parts if each[1] or not (each[2] and has_coda)]  # what is chosen by has ended
    return [Kind(bucket, *each) for bucket in reversed(CAPTURED) for each in flags]
