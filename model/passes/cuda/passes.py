"""One pass over padded rows: the step that a CUDA graph is made of, or that runs eagerly.

Reads nothing of the host: all that a step does is decided by its `Kind`, and all numbers come from the buffer
of its bucket. Invariant: the same rows in another bucket, or among other rows, have the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.network.config import LoopedConfig
from model.network.looped import LoopedTransformer
from model.passes.cuda.inputs import Columns
from model.passes.cuda.operations import Cache, Norms, Operations, Parts, Places
from model.passes.cuda.weights import Weights


class Kind(NamedTuple):
    """What a pass does: its bucket of rows, and which of the parts around the loop it runs."""

    bucket: int
    enters: bool
    ends: bool
    chooses: bool


class Done(NamedTuple):
    """What a pass leaves: states (bucket, hidden), fp32, as the head's norm reads them; tokens and logits."""

    states: Tensor
    chosen: Tensor | None


class Flow(NamedTuple):
    """What goes from layer to layer: states (rows, hidden), fp32, and what the next product reads of them."""

    states: Tensor
    inputs: Tensor


class CudaCache:
    """K/V and states of all cells, and of a spare one behind them that belongs to no page."""

    def __init__(
        self, config: LoopedConfig, num_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.spare = num_tokens
        cells, heads = num_tokens + 1, (config.num_kv_heads, config.head_dim)
        sizes = [config.loops_of_layer(layer) * cells for layer in range(config.num_caches)]
        self.layers = [
            Cache(*(torch.zeros(size, *heads, device=device, dtype=dtype) for _ in range(2)))
            for size in sizes
        ]
        self.states = torch.zeros(cells, config.hidden_size, device=device)
        self.entered = (
            torch.zeros(cells, config.hidden_size, device=device) if config.keeps_input else self.states
        )


class Step:
    """A model's pass, made of `operations`."""

    def __init__(
        self, model: LoopedTransformer, weights: Weights, cache: CudaCache, operations: Operations
    ) -> None:
        self.config, self.weights, self.cache, self.operations = model.config, weights, cache, operations
        self._windows = [(model.config.window(layer, 0) or 0) for layer in range(model.config.num_caches)]
        self._skips_first_adapter = model.skips_first_adapter

    def __call__(self, columns: Columns, kind: Kind, noise: Tensor) -> Done:
        """Runs one loop for all rows. `noise` (bucket, hidden), fp32: what entering states may start from."""
        if kind.enters:
            self._enter(columns, noise)
        states = self._loop(columns)
        if kind.ends and self.config.num_coda_layers:
            states = self._run_coda(columns, states)
        if not kind.chooses:
            return Done(states, None)
        logits = self.logits(self.finish(states.index_select(0, columns["read_rows"])))
        return Done(states, self.operations.choose(logits, columns.asked()))

    def finish(self, states: Tensor) -> Tensor:
        """The head's input (rows, hidden), in the model's dtype, of states that a step has left."""
        is_normed = self.config.norm_after_loop and not self.config.num_coda_layers
        norms = Norms(next=None if is_normed else self.weights.norm)
        return self.operations.join(None, states, norms)[1]

    def logits(self, inputs: Tensor) -> Parts:
        """Logits of the head's inputs, in one part."""
        return self.operations.product(inputs, self.weights.head)

    def _enter(self, columns: Columns, noise: Tensor) -> None:
        """Embedding and prelude of all rows; what comes of those that don't enter goes to the spare cell."""
        entered = self.weights.embedding.index_select(0, columns["tokens"]).float()
        entered = entered * self.config.embedding_scale
        entered = self._layers(self.config.prelude, entered, columns.entering())
        cells = columns["entering_cells"]
        if self.cache.entered is not self.cache.states:
            self.cache.entered.index_copy_(0, cells, entered)
        start = noise if self.config.has_noisy_start else entered
        self.cache.states.index_copy_(0, cells, start)

    def _loop(self, columns: Columns) -> Tensor:
        """The block over all rows; their new states, which are kept as well."""
        cells = columns["cells"]
        states = self.cache.states.index_select(0, cells)
        if self.weights.adapter is not None:
            states = self._mixed(states, self.cache.entered.index_select(0, cells), columns["loops"])
        states = self._layers(self.config.block, states, columns.looping())
        if self.config.norm_after_loop:
            states, _ = self.operations.join(None, states, Norms(sum=self.weights.norm))
        self.cache.states.index_copy_(0, cells, states)
        return states

    def _mixed(self, states: Tensor, entered: Tensor, loops: Tensor) -> Tensor:
        """The adapter's mixture of state and input; the input alone where the first loop leaves it out."""
        assert self.weights.adapter is not None
        both = torch.cat((states, entered), -1).to(self.weights.embedding.dtype)
        mixed, _ = self.operations.join(self.operations.product(both, self.weights.adapter), None, Norms())
        return torch.where((loops == 0)[:, None], entered, mixed) if self._skips_first_adapter else mixed

    def _run_coda(self, columns: Columns, states: Tensor) -> Tensor:
        if self.config.norm_before_coda:
            states, _ = self.operations.join(None, states, Norms(sum=self.weights.norm))
        return self._layers(self.config.coda, states, columns.coda())

    def _layers(self, layers: range, states: Tensor, places: Places) -> Tensor:
        """Runs layers; each leaves the input of the next one's first product beside its state."""
        if not layers:
            return states
        norms = [*(self.weights.layers[index].attn_norm for index in layers), None]
        flow = Flow(*self.operations.join(None, states, Norms(next=norms[0])))
        for index, following in zip(layers, norms[1:], strict=True):
            flow = self._layer(index, flow, places, following)
        return flow.states

    def _layer(self, index: int, flow: Flow, places: Places, following: Tensor | None) -> Flow:
        """One layer, and the norm that the layer behind it reads by."""
        run, layer, cache = self.operations, self.weights.layers[index], self.cache.layers[index]
        queries = run.rotate(run.product(flow.inputs, layer.qkv), layer.qk_bias, places, cache)
        attended = run.attend(queries, places, cache, self._windows[index])
        norms = Norms(layer.attn_out_norm, layer.attn_sum_norm, layer.mlp_norm)
        states, x = run.join(run.product(attended, layer.o), flow.states, norms)
        norms = Norms(layer.mlp_out_norm, layer.mlp_sum_norm, following)
        return Flow(*run.join(run.product(run.gated(x, layer.gate_up), layer.down), states, norms))
