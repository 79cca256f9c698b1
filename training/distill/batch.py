"""Many texts continued side by side by one model: what generating training data needs, and no more.

All rows of a batch advance together through a cache of fixed size, so that a step is a few large products;
the server's engine, which answers requests that come and go, attends sequence by sequence and takes ten
times as long for hundreds of equal ones. Knows nothing about what is written. Invariant: what is written
is a function of the model, the prompts and the seed (on one machine: rounding differs between machines).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.looped import LoopedTransformer

SHRINK_BELOW = 0.75  # of a batch's rows still being written: the finished ones are dropped
PROMPTS_AT_ONCE = 32  # that are read in one go: what they make on the way then fits a CPU's caches
LIKELIEST = 64  # tokens that one is drawn from


class Written(NamedTuple):
    """What was written behind a prompt; `ended`: whether it came to a stop token, which is left out."""

    tokens: list[int]
    ended: bool


class BatchWriter:
    """Continues prompts with a model of one loop, `rows` at a time."""

    def __init__(self, model: LoopedTransformer, stops: frozenset[int], rows: int = 256) -> None:
        """Raises ValueError for a looped model: only teachers, models of one loop, write data."""
        if model.config.num_loops != 1 or model.config.input_injection:
            raise ValueError(f"a teacher of one loop is wanted, not of {model.config.num_loops}")
        self.model, self.stops, self.rows = model, stops, rows

    @torch.inference_mode()
    def write(
        self, prompts: list[list[int]], max_tokens: int, temperatures: list[float], seed: int
    ) -> list[Written]:
        """Up to `max_tokens` behind each prompt, at its own temperature (0 is greedy), in order."""
        written: dict[int, Written] = {}
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), self.rows):
            chosen = order[start : start + self.rows]
            random = torch.Generator(self.model.device).manual_seed(seed * 1_000_003 + start)
            batch = _Batch(self.model, [prompts[i] for i in chosen], max_tokens)
            texts = batch.run([temperatures[i] for i in chosen], self.stops, random)
            written.update(zip(chosen, texts, strict=True))
        return [written[index] for index in range(len(prompts))]


class _Batch:
    """Rows with prompts that end in one column; shorter ones are padded in front."""

    def __init__(self, model: LoopedTransformer, prompts: list[list[int]], max_tokens: int) -> None:
        self.model, self.max_tokens, self.count = model, max_tokens, len(prompts)
        device, longest = model.device, max(map(len, prompts))
        self.ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        self.seen = torch.zeros(len(prompts), longest + max_tokens, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self.ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.seen[row, longest - len(prompt) :] = True
        config = model.config
        shape = (config.num_layers, len(prompts), longest + max_tokens, config.num_kv_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=model.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = self.seen[:, :longest].cumsum(1) - 1

    def run(self, temperatures: list[float], stops: frozenset[int], random: torch.Generator) -> list[Written]:
        """Writes until every row has come to a stop token or to its last column."""
        temperature = torch.tensor(temperatures, device=self.model.device)[:, None]
        rows = list(range(self.count))  # of the batch as it began
        tokens: list[list[int]] = [[] for _ in rows]
        ended: set[int] = set()
        width = self.ids.shape[1]
        logits = self._read()
        for step in range(self.max_tokens):
            chosen = _draw(logits, temperature, random)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row not in ended and token in stops:
                    ended.add(row)
                elif row not in ended:
                    tokens[row].append(token)
            going = [index for index, row in enumerate(rows) if row not in ended]
            if not going or step + 1 == self.max_tokens:
                break
            if len(going) < SHRINK_BELOW * len(rows):
                rows, temperature, chosen = [rows[i] for i in going], temperature[going], chosen[going]
                self._keep(torch.tensor(going, device=temperature.device))
            last = self.positions[:, -1:] + step + 1
            logits = self._forward(chosen[:, None], last, width + step, slice(None))
        return [Written(tokens[row], row in ended) for row in range(self.count)]

    def _keep(self, going: Tensor) -> None:
        self.k, self.v = self.k[:, going], self.v[:, going]
        self.seen, self.positions = self.seen[going], self.positions[going]

    def _read(self) -> Tensor:
        """The prompts; logits (rows, vocab) behind them."""
        parts = [slice(start, start + PROMPTS_AT_ONCE) for start in range(0, self.count, PROMPTS_AT_ONCE)]
        positions = self.positions.clamp_min(0)
        return torch.cat([self._forward(self.ids[part], positions[part], 0, part) for part in parts])

    def _forward(self, ids: Tensor, positions: Tensor, column: int, rows: slice) -> Tensor:
        """Logits (rows, vocab) behind the last of `ids` (rows, tokens), which stand from `column` on."""
        end = column + ids.shape[1]
        order = torch.arange(end, device=ids.device)
        behind = order <= torch.arange(column, end, device=ids.device)[:, None]
        # A padded token sees itself, or its softmax would have nothing to sum.
        mask = (behind & self.seen[rows, None, :end]) | (order == order[column:, None])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer, rows, column:end], self.v[layer, rows, column:end] = k, v
            keys, values = (cache[layer, rows, :end].transpose(1, 2) for cache in (self.k, self.v))
            seen = mask[:, None]
            if ids.shape[1] > 1:
                whole = F.scaled_dot_product_attention(
                    q.transpose(1, 2), keys, values, attn_mask=seen, enable_gqa=True
                )
                return whole.transpose(1, 2)
            # The heads of a group as so many queries: their keys are read once, not once for each.
            grouped = q.reshape(len(q), k.shape[-2], -1, q.shape[-1])
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen)
            return out.reshape(q.shape)

        model, angles = self.model, self.model.angles(positions)
        entered = model.enter(ids, angles, attend)
        state = model.loop(model.initial_state(entered), entered, angles, attend)[:, -1]
        logits: Tensor = model.head(state if model.config.norm_after_loop else model.norm(state))
        return logits.float()


def _draw(logits: Tensor, temperature: Tensor, random: torch.Generator) -> Tensor:
    """One token a row (rows,): the likeliest at temperature 0, else drawn from the likeliest few."""
    values, tokens = logits.topk(min(LIKELIEST, logits.shape[-1]))
    probabilities = (values / temperature.clamp_min(1e-4)).softmax(-1)
    drawn = torch.multinomial(probabilities, 1, generator=random)
    return torch.where(temperature > 0, tokens.gather(1, drawn), tokens[:, :1]).squeeze(1)
