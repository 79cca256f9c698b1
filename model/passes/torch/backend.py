"""The pass made of torch modules: rows -> tensors -> the shared block -> readouts.

Knows nothing about requests' ends or queues. The state of a row between two passes lies in the cache at
its cell, like its K/V, so a flush leaves nothing to clean up. Invariant: a pass waits for the device
once, when the tokens are read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.network.layers import Angles, Attend
from model.network.looped import LoopedTransformer
from model.options import KVCacheDtypeName
from model.passes.backend import BackendFacts, CacheBytes
from model.passes.kv import KV_DTYPES, head_bytes
from model.passes.noise import state_noise
from model.passes.rows import Ints, Rows
from model.passes.sampling import Sampler
from model.passes.scores import Reader
from model.passes.tensors import array_to_device, to_device
from model.passes.torch.attention import KVStore, PagedAttention, attention_for
from model.passes.torch.attention.store import zeros
from model.schedule.batch import PassResult, Readouts


@dataclass(frozen=True)
class TorchMaker:
    """Makes the backend of torch modules, as the model's own modules are."""

    kv_dtype: KVCacheDtypeName = "auto"  # the model's

    @property
    def name(self) -> str:
        """The backend's name, as its facts have it."""
        return "torch"

    def held_in(self, model: LoopedTransformer) -> torch.dtype:
        """What K and V are held in."""
        return KV_DTYPES.get(self.kv_dtype, model.dtype)

    def cache_bytes(self, model: LoopedTransformer) -> CacheBytes:
        """What a token takes of the cache. The model needs no weights."""
        config = model.config
        states = config.state_size + (config.hidden_size if config.keeps_input else 0)
        kv = config.kv_heads_per_token * head_bytes(config.head_dim, self.held_in(model))
        held_in = str(self.held_in(model)).removeprefix("torch.")
        return CacheBytes(kv, states * model.dtype.itemsize, held_in)

    def make(self, model: LoopedTransformer, num_tokens: int, max_positions: int) -> "TorchBackend":
        """A backend with a cache of `num_tokens`, for positions below `max_positions`."""
        del max_positions
        return TorchBackend(model, num_tokens, self)


class TorchBackend:
    """The model, its KV cache and the states in flight."""

    def __init__(self, model: LoopedTransformer, num_tokens: int, maker: TorchMaker) -> None:
        self.model, self._maker = model, maker
        config = model.config
        self.store = KVStore(config, num_tokens, model.device, model.dtype, maker.held_in(model))
        with torch.inference_mode():
            relative = model.relative.upto_distance(config.max_positions) if config.relative_bias else None
        self.attention: PagedAttention = attention_for(self.store, relative)
        self.sampler = Sampler(config.vocab_size, model.device)
        self.reader = Reader(model.logits, self.sampler, model.gate if config.exit_gate else None)
        self._states = zeros((num_tokens, config.state_size), model.device, model.dtype)
        shape = (num_tokens, config.hidden_size)
        self._entered = zeros(shape, model.device, model.dtype) if config.keeps_input else self._states

    @property
    def facts(self) -> BackendFacts:
        """What this backend is; never changes."""
        cache = self._maker.cache_bytes(self.model)
        return BackendFacts(
            name=self._maker.name,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            is_exact=False,
            bytes_per_token=cache.per_token,
            kv_cache_dtype=cache.dtype,
        )

    @torch.inference_mode()
    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """Runs one loop for every row and reads out; waits for the device once if there is a readout."""
        self._encode(rows)
        cells, positions = self._tensor(rows.cells), self._tensor(rows.positions)
        self._enter(rows, cells, positions)
        state = self._loop(rows, cells, positions)
        hidden = self._finish(rows, readouts, state, positions)
        return self.reader.read(hidden, readouts)

    def _encode(self, rows: Rows) -> None:
        """Encodes the sources of sequences that begin, one by one: a source's K/V never depend on another."""
        for source in rows.new_sources:
            assert source.table is not None
            cells = self._indices(list(source.table.cells(0, len(source.tokens))))
            tokens = self._indices(source.tokens)[None]
            encoded = self.model.encode(tokens, read_back=self.store.read_back).encoded[0]
            each = self.model.source_keys_and_values(encoded)
            for cache, (k, v) in zip(self.model.config.source_caches, each, strict=True):
                self.store.write(cache, cells, k, v)

    def _enter(self, rows: Rows, cells: Tensor, positions: Tensor) -> None:
        """Embeds the tokens of rows before their first loop and runs the prelude."""
        if not len(rows.token_ids):
            return
        if len(rows.entering) < len(rows):
            entering = self._tensor(rows.entering)
            cells, positions = cells[entering], positions[entering]
        angles: Angles = _NO_ANGLES
        attend: Attend = _no_attention
        if self.model.config.num_prelude_layers:
            angles = self.model.angles(positions)
            attend = self.attention.bind([run for run in rows.runs if run.loop == 0])
        entered = self.model.enter(self._tensor(rows.token_ids), angles, attend)
        if self._entered is not self._states:
            self._entered.index_copy_(0, cells, entered)
        self._states.index_copy_(0, cells, self._initial_states(rows, entered))

    def _initial_states(self, rows: Rows, entered: Tensor) -> Tensor:
        """States before the first loop, (entering rows, hidden): noise for the requests that ask for it."""
        states = self.model.initial_state(entered)
        for first, num_rows, seed, start, scale in rows.noises():
            noise = state_noise(seed, start, num_rows, states.shape[1])
            noise *= scale * self.model.config.initial_state_std
            # as in to_device: pinned, so that the copy waits for no pass
            pinned = noise if self.store.device.type == "cpu" else noise.pin_memory()
            states[first : first + num_rows].copy_(pinned, non_blocking=True)
        return states

    def _loop(self, rows: Rows, cells: Tensor, positions: Tensor) -> Tensor:
        """One loop for all rows; their new states (rows, hidden), also kept for their next pass."""
        state = self._states.index_select(0, cells)
        entered = state if self._entered is self._states else self._entered.index_select(0, cells)
        angles, attend = self.model.angles(positions), self._bind_looped(rows)
        state = self.model.loop(state, entered, angles, attend, self._first_rows(rows))
        self._states.index_copy_(0, cells, state)
        return state

    def _finish(self, rows: Rows, readouts: Readouts, state: Tensor, positions: Tensor) -> Tensor:
        """Coda and final norm; the head's inputs (rows, hidden), in the order that `Reader.read` wants.

        A coda has K/V of its own, so every row that ends its last loop runs it, prompt rows as well;
        a draft readout writes provisional K/V there, which the row's last loop overwrites.
        """
        wanted = [readout.row for readout in readouts.predicting]
        for prompt in readouts.scoring:
            wanted.extend(range(prompt.row, prompt.row + prompt.num_rows))
        wanted.extend(kept.row for kept in readouts.keeping)
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
