"""`loop_logprobs` and `exit_threshold` of both kinds of completion: shape, streams, and what is refused."""

import msgspec
import pytest

from server.schemas.loop_scores import LoopToken
from tests.contract.conftest import TEXT, Served, serving
from tests.contract.test_chat import answer, chat, chatting, chunks
from tests.fake_engine import INFO, FakeEngine, loops_of
from tests.loose import Json
from tests.text_tools import ids_of

GATED = msgspec.structs.replace(INFO, has_exit_gate=True)


def check_loops(entries: list[Json], token_ids: list[int], start: int, most: int, gate: float | None) -> None:
    """One entry a token, with the engine's own numbers of every loop, and no field that isn't described."""
    assert [entry["token_id"] for entry in entries] == token_ids
    for position, entry in enumerate(entries, start):
        LoopToken.model_validate(entry, strict=True, extra="forbid")
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        expected = loops_of(entry["token_id"], position, most, gate)
        assert [loop["loop"] for loop in entry["loops"]] == [1, 2, 3, 4]
        for loop, said in zip(entry["loops"], expected, strict=True):
            assert (loop["logprob"], loop["rank"]) == (said.scores.logprob, said.scores.rank)
            assert loop["agrees"] == said.agrees
            assert [(top["token_id"], top["logprob"]) for top in loop["top_logprobs"]] == said.scores.top
            assert ("gate" in loop) == (gate is not None)
            assert loop.get("gate") == gate


@pytest.mark.parametrize("most", [0, 1, 3])
async def test_every_loop_of_every_token_is_told(most: int) -> None:
    async with serving() as served:
        response = await served.post(prompt=[1, 2, 3], loop_logprobs=most, n=2, logprobs=most)
        for choice in response.json()["choices"]:
            check_loops(choice["loop_logprobs"], ids_of(TEXT), 3, most, None)
            lasts = [entry["loops"][-1]["logprob"] for entry in choice["loop_logprobs"]]
            assert lasts == choice["logprobs"]["token_logprobs"]
        assert "loop_logprobs" not in (await served.post(prompt=[1])).json()["choices"][0]


async def test_a_chat_tells_them_and_the_gate_of_a_model_that_has_one() -> None:
    async with chatting(FakeEngine(lambda _: ids_of(TEXT), info=GATED)) as served:
        body = await answer(served, loop_logprobs=2)
        start = len(served.engine.requests[0].prompt_token_ids)
        check_loops(body["choices"][0]["loop_logprobs"], ids_of(TEXT), start, 2, 0.25)
        assert "lossy" not in body


FIELDS: list[dict[str, Json]] = [
    {"loop_logprobs": 1},
    {"loop_logprobs": 0, "stop": "n f"},
    {"loop_logprobs": 2, "max_tokens": 5, "exit_threshold": 0.5},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("tokens_per_event", [1, 3])
async def test_joined_streams_are_the_whole_answers(fields: dict[str, Json], tokens_per_event: int) -> None:
    """A token's loops come with its text, and none of those that a stop string cuts off."""

    def engine() -> FakeEngine:
        return FakeEngine(lambda _: ids_of("Grün fährt"), tokens_per_event=tokens_per_event, info=GATED)

    async with serving(engine()) as served:
        whole = (await served.post(prompt="ab", return_token_ids=True, **fields)).json()
        parts = await served.chunks(prompt="ab", return_token_ids=True, **fields)
    choice, told = whole["choices"][0], list[Json]()
    for chunk in parts:
        assert chunk.get("lossy") == whole.get("lossy")
        told += chunk["choices"][0]["loop_logprobs"]
    assert told == choice["loop_logprobs"]
    assert [entry["token_id"] for entry in told] == choice["token_ids"]

    async with chatting(engine()) as served:
        whole = await answer(served, **fields)
        told = []
        for chunk in await chunks(served, **fields):
            assert chunk.get("lossy") == whole.get("lossy")
            for part in chunk["choices"]:
                told += part.get("loop_logprobs", [])
    assert told == whole["choices"][0]["loop_logprobs"]


async def test_an_answer_that_may_be_another_one_says_so() -> None:
    async with chatting(FakeEngine(lambda _: ids_of(TEXT), info=GATED)) as served:
        assert (await answer(served, exit_threshold=0.5))["lossy"] == ["exit_threshold"]
        assert served.engine.requests[0].exit_threshold == 0.5
        assert (await served.post(exit_threshold=0.5)).json()["lossy"] == ["exit_threshold"]
        assert all(chunk["lossy"] == ["exit_threshold"] for chunk in await chunks(served, exit_threshold=0.5))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loop_logprobs": 21}, "loop_logprobs must be at most 20, not 21"),
        ({"loop_logprobs": -1}, "loop_logprobs must be at least 0, not -1"),
        ({"loop_logprobs": True}, "loop_logprobs must be an integer, not True"),
        ({"exit_threshold": 0}, "exit_threshold must be greater than 0, not 0"),
        ({"exit_threshold": 1}, "exit_threshold must be less than 1, not 1"),
        ({"exit_threshold": 0.5}, "exit_threshold is 0.5, but this model has no exit gate"),
    ],
    ids=str,
)
async def test_bad_values_get_the_field_the_value_and_the_limit(
    served: Served, fields: dict[str, Json], words: str
) -> None:
    (field,) = fields
    responses = [await served.post(**fields)]
    async with chatting() as other:
        responses.append(await chat(other, **fields))
    for response in responses:
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, field)
        assert words in error["message"]
    assert not served.engine.requests


async def test_more_numbers_than_a_token_may_have_are_refused() -> None:
    """32 loops of 20 tokens each would be 40 kilobytes for each token of the answer."""
    info = msgspec.structs.replace(INFO, num_loops=32)
    async with serving(FakeEngine(lambda _: ids_of(TEXT), info=info)) as served:
        error = (await served.post(loop_logprobs=8)).json()["error"]
        assert error["param"] == "loop_logprobs"
        assert "loop_logprobs is 8, which for 32 loops is 288" in error["message"]
        assert "256 are the most" in error["message"]
        assert (await served.post(loop_logprobs=8, num_loops=4)).status_code == 200
        assert (await served.post(loop_logprobs=7)).status_code == 200
