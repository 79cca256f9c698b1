"""Large answers written in parts are the same text as those written at once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from server.json_parts import SLICE, json_bytes
from server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ChatResponse,
    TokenLogprob,
    TopLogprob,
)
from server.schemas.completions import CompletionChoice, CompletionLogprobs, CompletionResponse
from server.schemas.tokenize import TokenizeResponse

LENGTHS = st.sampled_from([0, 1, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE + 7])


@settings(deadline=None, max_examples=30)
@given(LENGTHS, LENGTHS, st.text(max_size=5), st.booleans())
def test_completions(length: int, num_ids: int, text: str, with_logprobs: bool) -> None:
    logprobs = CompletionLogprobs(
        tokens=[text] * length,
        token_logprobs=[None, *[-0.5] * length],
        top_logprobs=[{text: -1.25, "b": -9999.0}] * length,
        text_offset=list(range(length)),
    )
    choice = CompletionChoice(
        index=0,
        text=text,
        logprobs=logprobs if with_logprobs else None,
        finish_reason="stop",
        stop_reason=None,
    )
    if num_ids:
        choice.token_ids = list(range(num_ids))
    answer = CompletionResponse(id="i", created=1, model="m", choices=[choice] * (num_ids or 1))
    assert json_bytes(answer).decode() == answer.model_dump_json(exclude_unset=True)


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.text(max_size=5))
def test_chat(length: int, text: str) -> None:
    top = [TopLogprob(token=text, logprob=-1.0, bytes=[1, 2])] * 3
    tokens = [TokenLogprob(token=text, logprob=-1.0, bytes=[1], top_logprobs=top)] * length
    choice = ChatChoice(
        index=0,
        message=AssistantMessage(content=text),
        logprobs=ChatLogprobs(content=tokens),
        finish_reason="stop",
        stop_reason=None,
    )
    answer = ChatResponse.model_construct(  # type: ignore[call-arg] # answers are written without usage too
        id="i", created=1, model="m", choices=[choice] * 3
    )
    assert json_bytes(answer).decode() == answer.model_dump_json(exclude_unset=True)


@settings(deadline=None, max_examples=30)
@given(LENGTHS)
def test_tokens(length: int) -> None:
    answer = TokenizeResponse(
        count=length, max_model_len=9, tokens=list(range(length)), token_strs=["a"] * length
    )
    assert json_bytes(answer).decode() == answer.model_dump_json()
