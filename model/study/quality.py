"""How good a looped model is at each of its depths, and what that makes of speculation.

Two ways: teacher forcing over a text (one forward pass says what every depth would have predicted at every
position), and decoding through the engine. Knows nothing about files. Source of the expected passes: a
token's row enters when the prediction it grew from is made, so the gap between the rows of two tokens is
the depth from which on every readout agrees with the last one (R if none does); the mean gap is the passes
per token of an undisturbed sequence. With a coda that is a little optimistic: here every earlier position has
its final K/V, in the engine a draft's readout may find provisional ones. Losses and agreement are those of
`loop_logprobs`: the same loops, scored by the same function.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.engine import Engine
from model.network.looped import LoopedTransformer
from model.options import EngineOptions
from model.passes.backend import BackendMaker
from model.passes.kv import read_back
from model.passes.scores import token_logprobs
from model.protocol import GenerationRequest, SamplingParams
from model.schedule.drafts import FEW_LOOPS

PROMPT_TOKENS, NEW_TOKENS = 32, 64


class DepthQuality(NamedTuple):
    """One depth, over all positions of a text. `loss` is in nats per token."""

    depth: int
    loss: float
    accuracy: float  # share of positions where the likeliest token is the text's
    agreement: float  # share of positions where it is the last depth's


class TextQuality(NamedTuple):
    """All depths, and the passes per token to expect of greedy decoding by draft depths."""

    num_tokens: int
    depths: list[DepthQuality]
    expected_passes: dict[tuple[int, ...], float]
    likeliest: tuple[int, ...]  # token at each position, by the model's own depth

    @property
    def loss(self) -> float:
        """The loss of the model's own depth, in nats per token."""
        return self.depths[-1].loss


class Decoding(NamedTuple):
    """What a few greedy continuations through the engine cost, mean over all tokens but the first."""

    draft_policy: str
    draft_depths: tuple[int, ...]
    num_tokens: int
    passes_per_token: float
    rows_per_token: float


def judge_text(
    model: LoopedTransformer, ids: Sequence[int], window: int, extra: tuple[int, ...] = ()
) -> TextQuality:
    """Losses and agreement over windows of `window` tokens, each read on its own.

    `extra` are draft depths to judge beside the usual ones. Raises ValueError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; at least 2 are needed")
    losses, predictions, targets = _readouts(model, ids, window)
    loops = len(losses)
    depths = [
        DepthQuality(
            depth=depth + 1,
            loss=losses[depth].double().mean().item(),
            accuracy=_share(predictions[depth] == targets),
            agreement=_share(predictions[depth] == predictions[-1]),
        )
        for depth in range(loops)
    ]
    candidates = dict.fromkeys([*draft_candidates(loops), *([extra] if extra else [])])
    passes = {drafts: expected_passes(predictions, drafts) for drafts in candidates}
    return TextQuality(len(targets), depths, passes, tuple(predictions[-1].tolist()))


def judge_held(
    model: LoopedTransformer, ids: Sequence[int], window: int, dtype: torch.dtype, extra: tuple[int, ...] = ()
) -> TextQuality:
    """`judge_text` with K and V that are held in a type."""
    before = model.read_back
    model.read_back = functools.partial(read_back, dtype=dtype)
    try:
        return judge_text(model, ids, window, extra)
    finally:
        model.read_back = before


def same_tokens(one: TextQuality, other: TextQuality) -> float:
    """Share of positions of one text where two models find the same token likeliest."""
    same: int = sum(map(operator.eq, one.likeliest, other.likeliest))
    return same / one.num_tokens


def draft_candidates(num_loops: int) -> Iterator[tuple[int, ...]]:
    """Draft depths worth a look: each power of two below R, each two of them, and all if they are few."""
    powers = [2**i for i in range(num_loops.bit_length()) if 2**i < num_loops]
    if 4 <= num_loops <= FEW_LOOPS:
        yield tuple(range(1, num_loops))
    yield from ((depth,) for depth in powers)
    yield from ((first, second) for i, first in enumerate(powers) for second in powers[i + 1 :])


def expected_passes(predictions: Tensor, draft_depths: Sequence[int]) -> float:
    """Passes per token from what each depth predicts, (R, positions); see the module's docstring."""
    gaps = torch.full(predictions.shape[1:], len(predictions))
    holds = torch.ones_like(gaps, dtype=torch.bool)
    for depth in sorted(draft_depths, reverse=True):
        holds &= predictions[depth - 1] == predictions[-1]
        gaps[holds] = depth
    return gaps.double().mean().item()


def decode_prompts(
    model: LoopedTransformer,
    ids: Sequence[int],
    draft_depths: tuple[int, ...] | None,
    num_prompts: int,
    maker: BackendMaker | None = None,
) -> Decoding:
    """Greedy continuations of prompts from all over a text, one at a time, with speculation.

    `maker` brings what runs the passes, torch if there is none.
    """
    length = min(model.config.max_positions, PROMPT_TOKENS + NEW_TOKENS)
    config = EngineOptions(draft_depths=draft_depths, max_model_len=length, kv_cache_tokens=2 * length)
    engine = Engine(model, config, maker=maker)
    size = max(1, min(PROMPT_TOKENS, length // 2, len(ids)))
    starts = range(0, len(ids) - size + 1, max(1, (len(ids) - size) // num_prompts))
    stats, tokens = [], 0
    for start in starts[:num_prompts]:
        events = engine.run([_request(list(ids[start : start + size]), length - size)])["inspect"]
        tokens += sum(len(event.token_ids) for event in events) - 1
        stats.append(events[-1].stats)
    passes, rows = sum(s.passes for s in stats if s), sum(s.rows for s in stats if s)
    info = engine.info
    return Decoding(info.draft_policy, tuple(info.draft_depths), tokens, passes / tokens, rows / tokens)


def _request(prompt: list[int], max_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        request_id="inspect",
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
    )


@torch.inference_mode()
def _readouts(model: LoopedTransformer, ids: Sequence[int], window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R, positions), likeliest tokens (R, positions) and the text's tokens (positions,)."""
    losses, predictions, targets = [], [], []
    for start in range(0, len(ids) - 1, window):
        # One token more than is read: the last one's successor is a target too.
        part = torch.tensor(ids[start : start + window + 1], device=model.device)
        hidden = model.whole_loops(model.depths(part[None, :-1]))
        # Of each loop: the target, its log-probability, its rank, and the likeliest token.
        scores = torch.stack([token_logprobs(model.logits(each)[0], part[1:], 1) for each in hidden])
        losses.append(-scores[..., 1])
        predictions.append(scores[..., 3].long())
        targets.append(part[1:])
    return torch.cat(losses, 1).cpu(), torch.cat(predictions, 1).cpu(), torch.cat(targets).cpu()


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
