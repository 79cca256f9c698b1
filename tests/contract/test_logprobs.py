"""Log-probabilities of /v1/completions: shape, alignment with the text, echo, and best_of."""

import pytest

from model.protocol import GenerationRequest, TokenLogprobs
from tests.contract.conftest import TEXT, Served, serving
from tests.contract.test_completions import joined
from tests.fake_engine import EOS, FakeEngine, logprobs_of
from tests.loose import Json
from tests.text_tools import ids_of


async def choice_of(served: Served, **fields: Json) -> dict[str, Json]:
    response = await served.post(**fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Json] = response.json()["choices"][0]
    return choice


def check_shape(choice: dict[str, Json]) -> None:
    """Four lists of one length; each token's text is where its offset says."""
    logprobs = choice["logprobs"]
    tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
    assert len({len(logprobs[name]) for name in logprobs}) == 1
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)


async def test_tokens_their_logprobs_and_where_they_begin() -> None:
    async with serving(FakeEngine(lambda _: ids_of("aé"))) as served:
        choice = await choice_of(served, logprobs=1)
    check_shape(choice)
    expected = [logprobs_of(token, 2 + i, 1) for i, token in enumerate(ids_of("aé"))]
    assert choice["logprobs"]["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1]
    assert choice["logprobs"]["token_logprobs"] == [entry.logprob for entry in expected]
    tops = choice["logprobs"]["top_logprobs"]
    # The likeliest one, and the chosen one where that is another.
    assert [list(top) for top in tops] == [["b", "a"], ["bytes:\\xc3"], ["bytes:\\xaa", "bytes:\\xa9"]]
    assert tops[0]["b"] == expected[0].top[0][1] > tops[0]["a"] == expected[0].logprob


async def test_zero_gives_the_chosen_token_only(served: Served) -> None:
    choice = await choice_of(served, logprobs=0)
    check_shape(choice)
    logprobs = choice["logprobs"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top == {token: logprob}


async def test_no_logprobs_unless_asked(served: Served) -> None:
    assert (await choice_of(served))["logprobs"] is None
    assert served.engine.requests[0].logprobs is None
    assert (await choice_of(served, echo=True))["logprobs"] is None
    assert served.engine.requests[1].prompt_logprobs is None


@pytest.mark.parametrize("prompt", ["né", [110, 0xC3, 0xA9]], ids=str)
async def test_echo_gives_the_prompts_logprobs_and_null_for_the_first(
    served: Served, prompt: list[int] | str
) -> None:
    choice = await choice_of(served, prompt=prompt, echo=True, logprobs=2)
    check_shape(choice)
    logprobs = choice["logprobs"]
    assert choice["text"] == "né" + TEXT
    assert logprobs["tokens"][:3] == ["n", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"][:4] == [0, 1, 1, 2]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1] == logprobs_of(0xC3, 1, 2).logprob
    assert len(logprobs["tokens"]) == 3 + len(ids_of(TEXT))
    assert None not in logprobs["token_logprobs"][1:]


async def test_scoring_a_prompt_generates_nothing(served: Served) -> None:
    """What lm-eval does: no token of completion, every token of the prompt."""
    choice = await choice_of(served, prompt=[[104, 105, 33]], echo=True, logprobs=1, max_tokens=0)
    assert (choice["text"], choice["finish_reason"]) == ("hi!", "length")
    assert choice["logprobs"]["tokens"] == ["h", "i", "!"]
    assert choice["logprobs"]["token_logprobs"] == [
        None,
        *(logprobs_of(i, p, 1).logprob for p, i in ((1, 105), (2, 33))),
    ]
    (request,) = served.engine.requests
    assert (request.max_tokens, request.prompt_logprobs) == (0, 1)


async def test_echo_of_nothing_needs_no_engine(served: Served) -> None:
    assert (await choice_of(served, echo=True, max_tokens=0))["text"] == "hi"
    assert served.engine.requests == []


async def test_minus_infinity_is_clamped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(token_id: int, position: int, num_top: int) -> TokenLogprobs:
        entry = logprobs_of(token_id, position, num_top)
        return type(entry)(token_id=token_id, logprob=float("-inf"), rank=257, top=entry.top)

    monkeypatch.setattr("tests.fake_engine.logprobs_of", impossible)
    choice = await choice_of(served, logprobs=1)
    assert set(choice["logprobs"]["token_logprobs"]) == {-9999.0}


async def test_the_ending_token_has_its_logprob() -> None:
    async with serving(FakeEngine(lambda _: [97, EOS])) as served:
        choice = await choice_of(served, logprobs=0)
    assert choice["text"] == "a"
    assert choice["logprobs"]["tokens"] == ["a", "<eos>"]
    assert choice["logprobs"]["text_offset"] == [0, 1]


async def test_held_back_tokens_come_with_the_text_that_they_belong_to() -> None:
    """A chunk never shows a token whose text is held back for a stop string or an incomplete character."""
    async with serving(FakeEngine(lambda _: ids_of("abcé世stXop"))) as served:
        chunks = await served.chunks(logprobs=0, stop=["cé!", "stop"], return_token_ids=True)
    shown = ""
    for chunk in chunks:
        part = chunk["choices"][0]
        shown += part["text"]
        ends = [*part["logprobs"]["text_offset"][1:], len(shown)]
        assert all(end <= len(shown) for end in ends)
        assert len(part["token_ids"]) == len(part["logprobs"]["tokens"])
        assert b"".join(map(bytes, [part["token_ids"]])).decode() == part["text"]
    assert shown == "abcé世stXop"
    assert [chunk["choices"][0]["text"] for chunk in chunks][:3] == ["a", "b", "cé世"]


async def test_tokens_of_a_stop_string_come_last_as_in_the_whole_answer() -> None:
    async with serving(FakeEngine(lambda _: ids_of("one two"))) as served:
        choice = await choice_of(served, logprobs=0, stop="tw")
        streamed = joined(await served.chunks(logprobs=0, stop="tw"))[0]
    assert choice["text"] == "one "
    assert "".join(choice["logprobs"]["tokens"]) == "one tw"
    assert streamed["logprobs"] == choice["logprobs"]


def ranked_script(request: GenerationRequest) -> list[int]:
    """Texts whose mean log-probabilities differ: short ones come at earlier, likelier positions."""
    return ids_of("abcdefghij"[: 2 + (request.sampling.seed * 7) % 5])


async def test_best_of_returns_the_likeliest_in_order() -> None:
    async with serving(FakeEngine(ranked_script)) as served:
        fields: dict[str, Json] = {"prompt": ["p", "qq"], "seed": 1, "max_tokens": 50}
        every = (await served.post(n=6, logprobs=0, **fields)).json()["choices"]
        best = (await served.post(n=2, best_of=6, **fields)).json()
        with_logprobs = (await served.post(n=2, best_of=6, logprobs=1, **fields)).json()["choices"]

    def mean(choice: dict[str, Json]) -> float:
        values: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    expected = [
        choice["text"]
        for start in (0, 6)
        for choice in sorted(every[start : start + 6], key=mean, reverse=True)[:2]
    ]
    assert [choice["text"] for choice in best["choices"]] == expected
    assert expected[:2] != [every[0]["text"], every[1]["text"]], "the order must matter"
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert {choice["logprobs"] for choice in best["choices"]} == {None}
    assert all(request.logprobs == 0 for request in served.engine.requests[12:24])
    assert [choice["text"] for choice in with_logprobs] == expected
    assert best["usage"]["completion_tokens"] == sum(len(choice["text"]) for choice in every)


async def test_best_of_equal_to_n_ranks_nothing(served: Served) -> None:
    assert (await served.post(best_of=2, n=2, stream=True)).status_code == 200
    assert {request.logprobs for request in served.engine.requests} == {None}
