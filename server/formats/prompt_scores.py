"""`prompt_logprobs` of an answer, in vLLM's shape: each token of the prompt, and the likeliest ones.

Both kinds of completion show it alike.
"""

from collections.abc import Sequence

from model.protocol import TokenLogprobs
from server.schemas.prompt_scores import PromptScores, ScoredToken
from server.tokenizer import TextCodec

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


def prompt_scores(
    token_ids: Sequence[int], scores: Sequence[TokenLogprobs | None], most: int, codec: TextCodec
) -> PromptScores:
    """One entry for each token, None for the first; `most` is how many of the likeliest are shown."""
    pairs = zip(token_ids, scores, strict=True)
    return [None if score is None else _entry(token_id, score, most, codec) for token_id, score in pairs]


def clamp(logprob: float) -> float:
    """The log-probability, or the least that is shown."""
    return max(logprob, MIN_LOGPROB)


def _entry(token_id: int, score: TokenLogprobs, most: int, codec: TextCodec) -> dict[str, ScoredToken]:
    """By id, as JSON has it: the token of the prompt first, then the likeliest ones."""
    ranked = [(token_id, score.logprob, score.rank)]
    ranked += [(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top[:most], 1)]
    entry: dict[str, ScoredToken] = {}
    for token, logprob, rank in ranked:
        text = codec.token_bytes(token).decode(errors="replace")
        scored = ScoredToken.model_construct(logprob=clamp(logprob), rank=rank, decoded_token=text)
        entry.setdefault(str(token), scored)
    return entry
