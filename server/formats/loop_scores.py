"""`loop_logprobs` of an answer: each token, and what every loop says of it.

Both kinds of completion show it alike.
"""

from collections.abc import Sequence

from model.protocol import LoopScores
from server.choices import ShownToken
from server.formats.prompt_scores import clamp
from server.schemas.loop_scores import LikelyToken, Loop, LoopToken
from server.tokenizer import TextCodec


def loop_scores(tokens: Sequence[ShownToken], codec: TextCodec) -> list[LoopToken]:
    """An entry for each token; those of a generation that was asked for them. They are ours: not checked."""
    return [_token(token, codec) for token in tokens]


def _token(token: ShownToken, codec: TextCodec) -> LoopToken:
    written = codec.token_bytes(token.token_id)
    return LoopToken.model_construct(
        token=written.decode(errors="replace"),
        token_id=token.token_id,
        bytes=list(written),
        loops=[_loop(number, said, codec) for number, said in enumerate(token.loops, 1)],
    )


def _loop(number: int, said: LoopScores, codec: TextCodec) -> Loop:
    loop = Loop.model_construct(
        loop=number,
        logprob=clamp(said.scores.logprob),
        rank=said.scores.rank,
        agrees=said.agrees,
        top_logprobs=[_likely(token_id, logprob, codec) for token_id, logprob in said.scores.top],
    )
    if said.gate is not None:
        loop.gate = said.gate
    return loop


def _likely(token_id: int, logprob: float, codec: TextCodec) -> LikelyToken:
    written = codec.token_bytes(token_id)
    return LikelyToken.model_construct(
        token=written.decode(errors="replace"),
        token_id=token_id,
        logprob=clamp(logprob),
        bytes=list(written),
    )
