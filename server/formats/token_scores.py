"""Log-probabilities of an answer's tokens, as chat completions and responses have them."""

from collections.abc import Sequence

from server.choices import ShownToken
from server.formats.prompt_scores import clamp
from server.schemas.chat import TokenLogprob, TopLogprob
from server.tokenizer import TextCodec


def token_logprobs(tokens: Sequence[ShownToken], codec: TextCodec) -> list[TokenLogprob]:
    """An entry for each token; those of a generation that was asked for them."""
    return [_token(token, codec) for token in tokens]


def _token(token: ShownToken, codec: TextCodec) -> TokenLogprob:
    assert token.logprobs is not None
    chosen = _top(token.token_id, token.logprobs.logprob, codec)
    likeliest = [_top(token_id, logprob, codec) for token_id, logprob in token.logprobs.top]
    return TokenLogprob(
        token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=likeliest
    )


def _top(token_id: int, logprob: float, codec: TextCodec) -> TopLogprob:
    token = codec.token_bytes(token_id)
    return TopLogprob(token=token.decode(errors="replace"), logprob=clamp(logprob), bytes=list(token))
