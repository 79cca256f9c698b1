"""`wave` of a chunk: what the passes did for one choice, with the texts of all tokens that are named.

Both kinds of completion show it alike.
"""

from collections.abc import Iterator

from model.protocol import WavePass, WaveRecord
from server.schemas.wave import CommittedToken, Flush, Pass, Wave
from server.tokenizer import TextCodec


def shown_wave(record: WaveRecord, codec: TextCodec) -> Wave:
    """The record as JSON has it. It is ours, and not checked again."""
    token_ids = {token_id for one in record.passes for token_id in _tokens(one)}
    return Wave.model_construct(
        num_loops=record.num_loops,
        passes=[_pass(one) for one in record.passes],
        omitted=record.omitted,
        texts={str(i): codec.token_bytes(i).decode(errors="replace") for i in sorted(token_ids)},
    )


def _tokens(one: WavePass) -> Iterator[int]:
    yield from one.drafts
    for token in one.committed:
        yield token.token_id
        yield from (guess for _, guess in token.guesses)


def _pass(one: WavePass) -> Pass:
    return Pass.model_construct(
        runs=one.runs,
        position=one.position,
        committed=[
            CommittedToken.model_construct(
                token_id=token.token_id,
                agreed=sum(guess == token.token_id for _, guess in token.guesses),
                guesses=token.guesses,
            )
            for token in one.committed
        ],
        drafts=one.drafts,
        flushed=None
        if one.flushed is None
        else Flush.model_construct(position=one.flushed[0], depth=one.flushed[1]),
    )
