"""What single loops say of a token, and which readouts ask for it. Shared by all backends; no tensors.

A token is chosen after its last loop, and only then the earlier loops can be asked about it. So the head's
inputs of a row are kept from pass to pass, a few kilobytes a loop, and are all read by the head in the pass
that chooses the token: its weights are read once for all loops.
"""

from collections import abc

import msgspec

from model.protocol import LoopScores, TokenLogprobs
from model.schedule.batch import Readout


def scored_loops(predicting: abc.Sequence[Readout]) -> list[int]:
    """The readouts whose token is to be scored by every loop so far."""
    return [
        index
        for index, readout in enumerate(predicting)
        if readout.is_final and readout.sequence.request.loop_logprobs is not None
    ]


def gated_exits(predicting: abc.Sequence[Readout]) -> list[int]:
    """The readouts at which the exit gate decides whether their token is final."""
    return [i for i, readout in enumerate(predicting) if readout.sequence.wave.exit_threshold is not None]


def kept_inputs(readout: Readout) -> list[object]:
    """The head's inputs of the readout's row after each loop before this one."""
    return readout.sequence.head_inputs.get(readout.position - 1, [])


def num_likeliest(readout: Readout) -> int:
    """How many of the likeliest tokens are wanted of each loop: one at least, to be compared."""
    return max(1, readout.sequence.request.loop_logprobs or 0)


def loop_scores(
    rows: abc.Sequence[TokenLogprobs], gates: abc.Sequence[float], readout: Readout
) -> list[LoopScores]:
    """The scores of each loop, the last one's at the end, from `rows` with one likeliest token at least.

    `gates` has one number for each, or none in a model without a gate.
    """
    most, last = readout.sequence.request.loop_logprobs, rows[-1].top[0][0]
    stops: abc.Sequence[float | None] = gates or [None] * len(rows)
    return [
        LoopScores(
            scores=msgspec.structs.replace(row, top=row.top[:most]),
            agrees=row.top[0][0] == last,
            gate=gate,
        )
        for row, gate in zip(rows, stops, strict=True)
    ]
