"""One pass: scheduled rows -> tensors -> the shared block -> readouts -> one token for each readout.

Knows nothing about requests' ends or queues. The state of a row between two passes lies in the pool at
its token slot, like its K/V, so a flush leaves nothing to clean up. Invariant: a pass waits for the
device once, when the tokens are read.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from model.attention import KVStore, PagedAttention, attention_for
from model.attention.store import RowRun, zeros
from model.initial_state import state_noise
from model.layers import Attend
from model.looped import LoopedTransformer
from model.readout import PromptReadout, Reader
from model.sampling import Readout, RowwiseSampler, Sampler, to_device
from model.sequence import ScheduledRun, Sequence


class Runner:
    """The model, its KV cache and the states in flight."""

    def __init__(self, model: LoopedTransformer, num_tokens: int) -> None:
        self.model = model
        config = model.config
        self.store = KVStore(config, num_tokens, model.device, cache_dtype(model))
        self.attention: PagedAttention = attention_for(self.store, model.row_invariant)
        sampler = RowwiseSampler if model.row_invariant else Sampler
        self.sampler = sampler(config.vocab_size, model.device)
        self._reader = Reader(model, self.sampler)
        shape = (num_tokens, config.hidden_size)
        self._states = zeros(shape, model.device, model.dtype)
        injected = config.input_injection
        self._entered = zeros(shape, model.device, model.dtype) if injected else self._states

    @torch.inference_mode()
    def forward(self, batch: SequenceOf[ScheduledRun]) -> list[int]:
        """Runs one loop for every row; the tokens that the readouts predict, in order.

        Writes K/V and states of the rows' positions, and the log-probabilities that requests ask for to
        their sequences. Waits for the device once if there is a readout.
        """
        self._enter([item for item in batch if item.loop == 0])
        state = self._loop(batch)
        prompts = list(filter(None, map(_prompt_readout, batch)))
        hidden = self._finish(batch, state, prompts)
        return self._reader.read(hidden, [r for item in batch for r in _readouts(item)], prompts)

    def _enter(self, batch: SequenceOf[ScheduledRun]) -> None:
        """Embeds the tokens of rows before their first loop and runs the prelude."""
        if not batch:
            return
        ids: list[int] = []
        for item in batch:
            ids.extend(item.sequence.wave.tokens[item.start : item.start + item.num_rows])
        if self.model.config.num_prelude_layers:
            angles, attend = self.model.angles(self._positions(batch)), self._bind_unlooped(batch)
        else:
            angles, attend = _NO_ANGLES, _no_attention
        entered = self.model.enter(self._tensor(ids), angles, attend)
        slots = self._slots(batch)
        if self._entered is not self._states:
            self._entered.index_copy_(0, slots, entered)
        self._states.index_copy_(0, slots, self._initial_states(batch, entered))

    def _initial_states(self, batch: SequenceOf[ScheduledRun], entered: Tensor) -> Tensor:
        """States before the first loop, (rows, hidden): noise for the requests that ask for it."""
        states, first = self.model.initial_state(entered), 0
        for item in batch:
            request = item.sequence.request
            if request.init_scale > 0:
                noise = state_noise(request.sampling.seed, item.start, item.num_rows, states.shape[1])
                noise *= request.init_scale * self.model.config.initial_state_std
                # as in to_device: pinned, so that the copy waits for no pass
                pinned = noise if self.store.device.type == "cpu" else noise.pin_memory()
                states[first : first + item.num_rows].copy_(pinned, non_blocking=True)
            first += item.num_rows
        return states

    def _loop(self, batch: SequenceOf[ScheduledRun]) -> Tensor:
        """One loop for all rows; their new states (rows, hidden), also kept for their next pass."""
        slots = self._slots(batch)
        angles = self.model.angles(self._positions(batch))
        attend = self._bind_looped(batch)
        state = self._states.index_select(0, slots)
        entered = state if self._entered is self._states else self._entered.index_select(0, slots)
        state = self.model.loop(state, entered, angles, attend, self._first_rows(batch))
        self._states.index_copy_(0, slots, state)
        return state

    def _finish(
        self, batch: SequenceOf[ScheduledRun], state: Tensor, prompts: SequenceOf[PromptReadout]
    ) -> Tensor:
        """Coda and final norm; the head's inputs (rows, hidden), those of prompt readouts last.

        A coda has K/V of its own, so every row that ends its last loop runs it, prompt rows as well;
        a draft readout writes provisional K/V there, which the row's last loop overwrites.
        """
        due = batch
        if self.model.config.num_coda_layers:
            due = [item for item in batch if item.num_readouts or _is_last_loop(item)]
        rows = _rows_read_out(due, prompts)
        if not self.model.config.num_coda_layers:
            picked = state if len(rows) == len(state) and not prompts else state[self._tensor(rows)]
            return self.model.finish(picked, _NO_ANGLES, _no_attention)
        if not due:
            return state[:0]
        angles = self.model.angles(self._positions(due))
        hidden = self.model.finish(state[self._rows_of(batch, due)], angles, self._bind_unlooped(due))
        return hidden[self._tensor(rows)]

    def _bind_looped(self, batch: SequenceOf[ScheduledRun]) -> Attend:
        runs = [_row_run(item, item.loop) for item in batch]
        attend = self.attention.bind(runs)
        if not self.model.config.first_loop_gate:
            return attend
        # What a row reads there is stored: its own position and those before it have done loop 1.
        first = self.attention.bind([run._replace(loop=0) for run in runs], write=False)
        return self.model.gated(attend, first)

    def _first_rows(self, batch: SequenceOf[ScheduledRun]) -> Tensor | None:
        """Which rows run their first loop, (rows, 1), for a model that does something else there."""
        if not self.model.skips_first_adapter:
            return None
        rows = [item.loop == 0 for item in batch for _ in range(item.num_rows)]
        return to_device(rows, torch.bool, self.store.device)[:, None]

    def _bind_unlooped(self, batch: SequenceOf[ScheduledRun]) -> Attend:
        return self.attention.bind([_row_run(item, 0) for item in batch])

    def _positions(self, batch: SequenceOf[ScheduledRun]) -> Tensor:
        positions: list[int] = []
        for item in batch:
            positions.extend(range(item.start, item.start + item.num_rows))
        return self._tensor(positions)

    def _slots(self, batch: SequenceOf[ScheduledRun]) -> Tensor:
        slots: list[int] = []
        for item in batch:
            assert item.sequence.table is not None
            slots.extend(item.sequence.table.slots(item.start, item.num_rows))
        return self._tensor(slots)

    def _rows_of(self, batch: SequenceOf[ScheduledRun], chosen: SequenceOf[ScheduledRun]) -> Tensor:
        wanted, rows, total = set(map(id, chosen)), list[int](), 0
        for item in batch:
            if id(item) in wanted:
                rows.extend(range(total, total + item.num_rows))
            total += item.num_rows
        return self._tensor(rows)

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self.store.device)


def _is_last_loop(item: ScheduledRun) -> bool:
    return item.loop + 1 == item.sequence.wave.num_loops


def _readouts(item: ScheduledRun) -> list[Readout]:
    """The readouts of a run that predict tokens."""
    end, is_last = item.start + item.num_rows, _is_last_loop(item)
    positions = range(end - item.num_readouts + 1, end + 1)
    return [Readout(item.sequence, position, is_last) for position in positions]


def _prompt_readout(item: ScheduledRun) -> PromptReadout | None:
    """The rows of a run that score the tokens of their own prompt, if the request asks for it."""
    if item.sequence.request.prompt_logprobs is None or not _is_last_loop(item):
        return None
    num_rows = min(item.num_rows, item.sequence.wave.prompt_length - 1 - item.start)
    return PromptReadout(item.sequence, item.start, num_rows) if num_rows > 0 else None


def _rows_read_out(due: SequenceOf[ScheduledRun], prompts: SequenceOf[PromptReadout]) -> list[int]:
    """Indices among the rows of `due`: first of the readouts that predict, then of the prompts' rows."""
    starts, total = dict[tuple[Sequence, int], int](), 0
    rows: list[int] = []
    for item in due:
        starts[item.sequence, item.start] = total
        total += item.num_rows
        rows.extend(range(total - item.num_readouts, total))
    for prompt in prompts:
        start = starts[prompt.sequence, prompt.start]
        rows.extend(range(start, start + prompt.num_rows))
    return rows


_NO_ANGLES = (torch.empty(0), torch.empty(0))


def _no_attention(layer: int, *_: Tensor) -> Tensor:
    raise AssertionError(f"layer {layer} attended where the model has no layers")


def _row_run(item: ScheduledRun, loop: int) -> RowRun:
    assert item.sequence.table is not None
    return RowRun(item.sequence.table, item.start, item.num_rows, loop)


def bytes_per_token(model: LoopedTransformer) -> int:
    """Bytes that one token slot takes: K/V of all slots, and the states in flight."""
    states = 2 if model.config.input_injection else 1
    kv = model.config.kv_bytes_per_token(cache_dtype(model).itemsize)
    return kv + states * model.config.hidden_size * model.dtype.itemsize


def cache_dtype(model: LoopedTransformer) -> torch.dtype:
    """The dtype of K and V: the model's own, but batch-invariant attention works in fp32."""
    return torch.float32 if model.row_invariant else model.dtype
