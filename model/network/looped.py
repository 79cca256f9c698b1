"""LoopedTransformer: embedding, prelude, the shared block, coda and readout.

Knows nothing about requests, caches or sampling: whoever calls it brings an `Attend` that stores and
reads K and V. Invariant: `loop` is one function of (state, injected input) whatever the depth of a
row (but for one flag), so rows at different depths run in one batch.
"""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.network.config import InitialState, LoopedConfig
from model.network.encoder import Encoder, hidden_from_scores
from model.network.layers import (
    Angles,
    Attend,
    Layer,
    ReadBack,
    Rotary,
    causal_attention,
    make_layer,
    make_norm,
    masked_attention,
    scored_attention,
    seen_tokens,
    wide,
)
from model.network.relative import RelativeScores

Stored = dict[int, tuple[Tensor, Tensor]]  # layer -> K and V of whole sequences


def _as_it_was(x: Tensor) -> Tensor:
    return x


class Source(NamedTuple):
    """Encoded sources (batch, tokens, hidden), and which tokens are theirs (batch, tokens); None: all."""

    encoded: Tensor
    seen: Tensor | None = None


class LoopedTransformer(nn.Module):
    """A depth-shared decoder: prelude, block x num_loops, coda, head; with an encoder before it in some."""

    def __init__(self, config: LoopedConfig) -> None:
        """`read_back` may be set: whole sequences ask it for all K and V, as if they had been stored."""
        super().__init__()
        self.config = config
        self.read_back: ReadBack = _as_it_was
        self.rotary = Rotary(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        # What differs between two rotary embeddings is in the angles.
        self.second_rotary = Rotary(config, config.second_rope) if config.second_rope else None
        self.layers = nn.ModuleList(make_layer(config, self.rotary) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        if config.input_injection:
            self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        if config.exit_gate:
            self.gate = nn.Linear(config.hidden_size, 1)
        if config.unit_scales:
            self.logit_scale = nn.Parameter(torch.ones(config.vocab_size))
        if config.low_cycles:
            self.low_state = nn.Parameter(torch.zeros(config.hidden_size))
        if config.relative_bias:
            self.relative = RelativeScores(config.relative_bias, config.num_heads, both_ways=False)
        if config.encoder:
            self.encoder = Encoder(config, self.rotary)

    def tie(self) -> None:
        """Makes head and embedding one tensor again where the config ties them (`to_empty` parts them)."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.weight.device

    def angles(self, positions: Tensor) -> Angles:
        """Rotary cos and sin of integer positions (...), for the calls below; nothing if none is rotated."""
        if self.config.relative_bias is not None:
            return ()
        angles: Angles = self.rotary(positions, self.dtype)
        if self.second_rotary is not None:
            angles = (*angles, *self.second_rotary(positions, self.dtype))
        return angles

    def enter(self, token_ids: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """Embedding and prelude of token ids (...); returns the block's input (..., hidden)."""
        h: Tensor = self.embedding(token_ids)
        if self.config.embedding_scale != 1.0:
            h = h * self.config.embedding_scale
        h = self._run(self.config.prelude, h, angles, attend)
        return self.norm(h) if self.config.norm_after_prelude else h

    def initial_state(self, entered: Tensor) -> Tensor:
        """State before the first loop: zeros where it would be noise of scale 0, else the input itself.

        (..., state_size); with two states the low one stands behind the high one, as always.
        """
        if self.config.low_cycles:
            return torch.cat((entered, self.low_state.expand_as(entered)), -1)
        return torch.zeros_like(entered) if self.config.has_noisy_start else entered

    def loop(
        self, state: Tensor, entered: Tensor, angles: Angles, attend: Attend, first: Tensor | None = None
    ) -> Tensor:
        """One loop of the block over a state (..., state_size); `entered` is what `enter` gave the rows.

        `first` (..., 1), bool: which rows run their first loop. Only a model that leaves the adapter
        out of it (`skips_first_adapter`) needs to know.
        """
        if self.config.input_injection:
            mixed = self.adapter(torch.cat((state, entered), -1)).to(entered.dtype)  # autocast narrows it
            state = mixed if first is None else torch.where(first, entered, mixed)
        if self.config.input_addition:
            state = state + entered
        if self.config.low_cycles:
            return self._run_stacks(state, angles, attend)
        state = self._run(self.config.block, state, angles, attend)
        return self.norm(state) if self.config.norm_after_loop else state

    def finish(self, state: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """Coda and final norm of a state after any number of loops: the head's input (..., hidden)."""
        state = state[..., : self.config.hidden_size]  # the high one of two states
        if self.config.norm_before_coda:
            state = self.norm(state)
        state = self._run(self.config.coda, state, angles, attend)
        is_normed = self.config.norm_after_loop and not self.config.num_coda_layers
        return state if is_normed else self.norm(state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab) of the head's inputs (..., hidden); in the model's dtype, in fp32 if scaled."""
        if self.config.head_scale != 1.0:
            hidden = hidden * self.config.head_scale
        logits: Tensor = self.head(hidden)
        if self.config.unit_scales is None:
            return logits
        return wide(logits) * self.logit_scales

    @property
    def logit_scales(self) -> Tensor:
        """What logits are multiplied by, (vocab,), in a model with learned scales."""
        assert self.config.unit_scales is not None
        return wide(self.logit_scale) * self.config.unit_scales.logit

    def encode(
        self, token_ids: Tensor, seen: Tensor | None = None, read_back: ReadBack | None = None
    ) -> Source:
        """What the encoder makes of sources (batch, tokens); `seen` as in `Source`.

        K and V in it are as `read_back` gives them, by default the model's own.
        """
        embedded = self.embedding(token_ids)
        return Source(self.encoder(embedded, seen, read_back or self.read_back), seen)

    def source_keys_and_values(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, K and V (..., heads, head_dim) of encoded sources (..., hidden)."""
        layers = (cast(Layer, layer) for layer in self.layers)
        return [layer.source_attn.keys_and_values(encoded) for layer in layers]

    def readout(self, state: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """Logits (..., vocab) of a state after any number of loops."""
        return self.logits(self.finish(state, angles, attend))

    @property
    def skips_first_adapter(self) -> bool:
        """Whether `loop` must be told which rows run their first loop."""
        return self.config.input_injection and self.config.initial_state is InitialState.INPUT_ALONE

    def gated(self, own: Attend, first: Attend) -> Attend:
        """The `Attend` of a model with `first_loop_gate`: both branches, mixed head by head.

        `own` attends over the K/V of the row's own loop, in its window; `first` over all that the
        first loop stored, and stores nothing. For a row in its first loop they are one and the same,
        and so is their mixture.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            local, everything = own(layer, q, k, v), first(layer, q, k, v)
            attention = cast(Layer, self.layers[layer]).attn
            return torch.lerp(local, everything, attention.first_loop_share(q))

        return attend

    def depths(
        self,
        token_ids: Tensor,
        num_loops: int | None = None,
        initial_state: Tensor | None = None,
        prefix: int = 0,
        source: Source | None = None,
    ) -> list[Tensor]:
        """States after loop 1..num_loops of whole sequences, without a cache: the slow, obvious way.

        token_ids (batch, tokens); initial_state (tokens, hidden) or None; each state is (batch,
        tokens, state_size). The first `prefix` tokens see one another both ways. A model with an encoder
        needs a `source` (batch, ...). Training and the reference logits use it.
        """
        if (source is None) == (self.config.encoder is not None):
            needs = "needs a source" if source is None else "has no encoder for a source"
            raise ValueError(f"this {self.config.family} model {needs}")
        if source is not None:
            return self._depths_behind(token_ids, num_loops, source)
        angles = self.angles(torch.arange(token_ids.shape[-1], device=token_ids.device))
        stored: Stored = {}
        entered = self.enter(token_ids, angles, self._attend_whole(0, stored, prefix))
        state = self.initial_state(entered) if initial_state is None else initial_state.expand_as(entered)
        states = []
        for loop in range(num_loops or self.config.num_loops):
            first = torch.tensor([loop == 0], device=state.device) if self.skips_first_adapter else None
            state = self.loop(state, entered, angles, self._attend_whole(loop, stored, prefix), first)
            states.append(state)
        return states

    def _depths_behind(self, token_ids: Tensor, num_loops: int | None, source: Source) -> list[Tensor]:
        """`depths` of a decoder behind an encoder: no prelude, no rotary embedding, nothing injected."""
        attend = self._attend_source(token_ids, source)
        state, states = self.embedding(token_ids), []
        for _ in range(num_loops or self.config.num_loops):
            state = self.loop(state, state, (), attend)
            states.append(state)
        return states

    def whole_loops(self, states: list[Tensor]) -> Iterator[Tensor]:
        """The head's input (batch, tokens, hidden) after each loop, of the states that `depths` returned.

        What each token's loops say where all tokens before it have run all of theirs, as in decoding: a coda
        behind an earlier loop sees itself and, of earlier tokens, what the coda stored behind the last loop.
        """
        if not self.config.num_coda_layers:
            yield from map(self.whole_finish, states)
            return
        angles = self.angles(torch.arange(states[-1].shape[-2], device=states[-1].device))
        stored: Stored = {}
        last = self.finish(states[-1], angles, self._attend_whole(0, stored))
        for state in states[:-1]:
            yield self.finish(state, angles, self._attend_stored(stored))
        yield last

    def whole_finish(self, state: Tensor) -> Tensor:
        """The head's input (batch, tokens, hidden) of one of the states that `depths` returned."""
        angles = self.angles(torch.arange(state.shape[-2], device=state.device))
        return self.finish(state, angles, self._attend_whole(0, {}))

    def whole_readout(self, state: Tensor) -> Tensor:
        """Logits (batch, tokens, vocab) of one of the states that `depths` returned."""
        return self.logits(self.whole_finish(state))

    def _attend_whole(self, loop: int, stored: Stored, prefix: int = 0) -> Attend:
        """Attention over whole sequences in this loop (0..R-1); the first one fills `stored`."""

        def own(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = self.read_back(k), self.read_back(v)
            if loop == 0:
                stored[layer] = k, v
            return causal_attention(q, k, v, self.config.window(layer, loop), prefix)

        def first(layer: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
            return causal_attention(q, *stored[layer])

        return self.gated(own, first) if self.config.first_loop_gate and loop > 0 else own

    def _attend_stored(self, stored: Stored) -> Attend:
        """Attention of each token over itself and over what is `stored` of those before it."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            tokens = q.shape[-3]
            own = torch.eye(tokens, dtype=torch.bool, device=q.device)
            before = seen_tokens(tokens, self.config.window(layer, 0), 0, q.device) & ~own
            own_stored = self.read_back(k), self.read_back(v)
            keys, values = (torch.cat(pair, -3) for pair in zip(stored[layer], own_stored, strict=True))
            return masked_attention(q, keys, values, torch.cat((before, own), -1))

        return attend

    def _attend_source(self, token_ids: Tensor, source: Source) -> Attend:
        """Attention over whole texts (batch, tokens) and over their sources."""
        config, device = self.config, token_ids.device
        places = torch.arange(token_ids.shape[-1], device=device)
        ahead = places - places[:, None]
        bias = self.relative(ahead).permute(2, 0, 1).masked_fill(ahead > 0, -torch.inf)
        stored = self.source_keys_and_values(source.encoded)
        hidden = None if source.seen is None else hidden_from_scores(source.seen, self.dtype)

        def attend(cache: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache in config.source_caches:
                k, v = (self.read_back(x) for x in stored[cache - config.source_caches.start])
                return scored_attention(q, k, v, hidden, config.attention_scale)
            k, v = self.read_back(k), self.read_back(v)
            return scored_attention(q, k, v, bias, config.attention_scale)

        return attend

    def _run_stacks(self, state: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """A loop over two states side by side (..., 2 hidden): the low stack's cycles, the high stack."""
        cycles, size = self.config.low_cycles, self.config.stack_size
        high, low = state.chunk(2, -1)
        for cycle in range(cycles):
            low = self.norm(self._run(range(size), low + high, angles, attend, cycle * size))
        behind = (cycles - 1) * size
        high = self.norm(self._run(range(size, 2 * size), high + low, angles, attend, behind))
        return torch.cat((high, low), -1)

    def _run(self, layers: range, h: Tensor, angles: Angles, attend: Attend, offset: int = 0) -> Tensor:
        """Runs layers, whose K/V lies at their indices plus `offset`."""
        for index in layers:
            h = self.layers[index](index + offset, h, self._angles_of(index, angles), attend)
        return h

    def _angles_of(self, layer: int, angles: Angles) -> Angles:
        return angles[2:] if layer in self.config.second_rope_layers else angles[:2]
