"""The pass made of torch modules: rows -> tensors -> the shared block -> readouts.

Knows nothing about requests' ends or queues. The state of a row between two passes lies in the cache at
its token slot, like its K/V, so a flush leaves nothing to clean up. Invariant: a pass waits for the device
once, when the tokens are read.
"""

import torch
from torch import Tensor

from model.network.layers import Attend
from model.network.looped import LoopedTransformer
from model.passes.backend import BackendFacts
from model.passes.noise import state_noise
from model.passes.rows import Ints, Rows
from model.passes.sampling import RowwiseSampler, Sampler
from model.passes.scores import Reader
from model.passes.tensors import array_to_device, to_device
from model.passes.torch.attention import KVStore, PagedAttention, attention_for
from model.passes.torch.attention.store import zeros
from model.schedule.batch import PassResult, Readouts


class TorchMaker:
    """Makes the backend of torch modules, as the model's own modules are."""

    def bytes_per_token(self, model: LoopedTransformer) -> int:
        """See BackendMaker."""
        return bytes_per_token(model)

    def make(self, model: LoopedTransformer, num_tokens: int, max_positions: int) -> "TorchBackend":
        """See BackendMaker."""
        del max_positions
        return TorchBackend(model, num_tokens)


class TorchBackend:
    """The model, its KV cache and the states in flight."""

    def __init__(self, model: LoopedTransformer, num_tokens: int) -> None:
        self.model = model
        config = model.config
        self.store = KVStore(config, num_tokens, model.device, cache_dtype(model))
        self.attention: PagedAttention = attention_for(self.store, model.row_invariant)
        sampler = RowwiseSampler if model.row_invariant else Sampler
        self.sampler = sampler(config.vocab_size, model.device)
        self.reader = Reader(model.head, self.sampler)
        shape = (num_tokens, config.hidden_size)
        self._states = zeros(shape, model.device, model.dtype)
        injected = config.input_injection
        self._entered = zeros(shape, model.device, model.dtype) if injected else self._states

    @property
    def facts(self) -> BackendFacts:
        """See Backend."""
        return BackendFacts(
            name="torch",
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            is_exact=self.model.row_invariant,
            bytes_per_token=bytes_per_token(self.model),
        )

    @torch.inference_mode()
    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """See Backend. Waits for the device once if there is a readout."""
        slots, positions = self._tensor(rows.slots), self._tensor(rows.positions)
        self._enter(rows, slots, positions)
        state = self._loop(rows, slots, positions)
        hidden = self._finish(rows, readouts, state, positions)
        return self.reader.read(hidden, readouts)

    def _enter(self, rows: Rows, slots: Tensor, positions: Tensor) -> None:
        """Embeds the tokens of rows before their first loop and runs the prelude."""
        if not len(rows.token_ids):
            return
        if len(rows.entering) < len(rows):
            entering = self._tensor(rows.entering)
            slots, positions = slots[entering], positions[entering]
        angles: tuple[Tensor, Tensor] = _NO_ANGLES
        attend: Attend = _no_attention
        if self.model.config.num_prelude_layers:
            angles = self.model.angles(positions)
            attend = self.attention.bind([run for run in rows.runs if run.loop == 0])
        entered = self.model.enter(self._tensor(rows.token_ids), angles, attend)
        if self._entered is not self._states:
            self._entered.index_copy_(0, slots, entered)
        self._states.index_copy_(0, slots, self._initial_states(rows, entered))

    def _initial_states(self, rows: Rows, entered: Tensor) -> Tensor:
        """States before the first loop, (entering rows, hidden): noise for the requests that ask for it."""
        states = self.model.initial_state(entered)
        for first, num_rows, seed, start, scale in rows.noises:
            noise = state_noise(seed, start, num_rows, states.shape[1])
            noise *= scale * self.model.config.initial_state_std
            # as in to_device: pinned, so that the copy waits for no pass
            pinned = noise if self.store.device.type == "cpu" else noise.pin_memory()
            states[first : first + num_rows].copy_(pinned, non_blocking=True)
        return states

    def _loop(self, rows: Rows, slots: Tensor, positions: Tensor) -> Tensor:
        """One loop for all rows; their new states (rows, hidden), also kept for their next pass."""
        state = self._states.index_select(0, slots)
        entered = state if self._entered is self._states else self._entered.index_select(0, slots)
        angles, attend = self.model.angles(positions), self._bind_looped(rows)
        state = self.model.loop(state, entered, angles, attend, self._first_rows(rows))
        self._states.index_copy_(0, slots, state)
        return state

    def _finish(self, rows: Rows, readouts: Readouts, state: Tensor, positions: Tensor) -> Tensor:
        """Coda and final norm; the head's inputs (rows, hidden), first those of rows that predict.

        A coda has K/V of its own, so every row that ends its last loop runs it, prompt rows as well;
        a draft readout writes provisional K/V there, which the row's last loop overwrites.
        """
        wanted = [readout.row for readout in readouts.predicting]
        for prompt in readouts.scoring:
            wanted.extend(range(prompt.row, prompt.row + prompt.num_rows))
        if not self.model.config.num_coda_layers:
            whole = wanted == list(range(len(rows)))
            picked = state if whole else state[self._indices(wanted)]
            return self.model.finish(picked, _NO_ANGLES, _no_attention)
        return self._coda(rows, wanted, state, positions)

    def _coda(self, rows: Rows, wanted: list[int], state: Tensor, positions: Tensor) -> Tensor:
        """The hidden states of the rows `wanted`; also runs the coda for all rows that end their loops."""
        read = set(wanted)
        runs = enumerate(zip(rows.runs, rows.first_rows, rows.ends_loops, strict=True))
        due = [
            index
            for index, (run, first, ends) in runs
            if ends or not read.isdisjoint(range(first, first + run.num_rows))
        ]
        if not due:
            return state[:0]
        taking_part = rows.rows_of(due)
        place = {int(row): index for index, row in enumerate(taking_part)}
        chosen = self._tensor(taking_part)
        attend = self.attention.bind([rows.runs[i]._replace(loop=0) for i in due])
        hidden = self.model.finish(state[chosen], self.model.angles(positions[chosen]), attend)
        return hidden[self._indices([place[row] for row in wanted])]

    def _bind_looped(self, rows: Rows) -> Attend:
        attend = self.attention.bind(rows.runs)
        if not self.model.config.first_loop_gate:
            return attend
        # What a row reads there is stored: its own position and those before it have done loop 1.
        first = self.attention.bind([run._replace(loop=0) for run in rows.runs], write=False)
        return self.model.gated(attend, first)

    def _first_rows(self, rows: Rows) -> Tensor | None:
        """Which rows run their first loop, (rows, 1), for a model that does something else there."""
        if not self.model.skips_first_adapter:
            return None
        return array_to_device(rows.loops == 0, self.store.device)[:, None]

    def _tensor(self, values: Ints) -> Tensor:
        return array_to_device(values, self.store.device)

    def _indices(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self.store.device)


_NO_ANGLES = (torch.empty(0), torch.empty(0))


def _no_attention(layer: int, *_: Tensor) -> Tensor:
    raise AssertionError(f"layer {layer} attended where the model has no layers")


def bytes_per_token(model: LoopedTransformer) -> int:
    """Bytes that one token slot takes: K/V of all slots, and the states in flight."""
    states = 2 if model.config.input_injection else 1
    kv = model.config.kv_bytes_per_token(cache_dtype(model).itemsize)
    return kv + states * model.config.hidden_size * model.dtype.itemsize


def cache_dtype(model: LoopedTransformer) -> torch.dtype:
    """The dtype of K and V: the model's own, but batch-invariant attention works in fp32."""
    return torch.float32 if model.row_invariant else model.dtype
