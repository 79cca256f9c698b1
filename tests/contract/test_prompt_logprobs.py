"""`prompt_logprobs` of both kinds of completion: shape, ranks, and what it is not allowed with."""

import pytest

from tests.contract.conftest import serving
from tests.contract.test_chat import answer, chat, chatting
from tests.contract.test_logprobs import choice_of
from tests.fake_engine import logprobs_of
from tests.loose import Json
from tests.text_tools import ids_of


def check_scores(entries: list[Json], token_ids: list[int], most: int) -> None:
    """One entry a token: the engine's own numbers, its `most` likeliest and no others."""
    assert len(entries) == len(token_ids)
    assert entries[0] is None
    for position, (entry, token_id) in enumerate(zip(entries, token_ids, strict=True)):
        if position == 0:
            continue
        said = logprobs_of(token_id, position, most)
        assert entry[str(token_id)]["logprob"] == said.logprob
        assert entry[str(token_id)]["rank"] == said.rank
        assert set(entry) == {str(token_id), *(str(other) for other, _ in said.top)}
        for rank, (other, logprob) in enumerate(said.top, 1):
            if other != token_id:
                assert (entry[str(other)]["logprob"], entry[str(other)]["rank"]) == (logprob, rank)
        assert all(isinstance(scored["decoded_token"], str) for scored in entry.values())


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 2])
async def test_each_choice_of_a_completion_scores_its_prompt(most: int, n: int) -> None:
    async with serving() as served:
        response = await served.post(prompt=["abc", "de"], prompt_logprobs=most, n=n)
        choices = response.json()["choices"]
    for choice in choices:
        check_scores(choice["prompt_logprobs"], ids_of("abc" if choice["index"] < n else "de"), most)


async def test_a_chat_scores_its_prompt() -> None:
    async with chatting() as served:
        body = await answer(served, prompt_logprobs=2)
        check_scores(body["prompt_logprobs"], served.engine.requests[0].prompt_token_ids, 2)
        assert "prompt_logprobs" not in await answer(served)


@pytest.mark.parametrize(("logprobs", "most"), [(0, 3), (3, 0), (1, 1)])
async def test_an_echo_shows_what_it_asked_for_and_no_more(logprobs: int, most: int) -> None:
    async with serving() as served:
        alone = await choice_of(served, echo=True, logprobs=logprobs)
        both = await choice_of(served, echo=True, logprobs=logprobs, prompt_logprobs=most)
        check_scores(both["prompt_logprobs"], served.engine.requests[-1].prompt_token_ids, most)
    assert both["logprobs"] == alone["logprobs"]


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 21}, {"prompt_logprobs": -1}], ids=str)
async def test_numbers_out_of_range_are_refused(fields: dict[str, Json]) -> None:
    async with chatting() as served:
        assert (await chat(served, **fields)).json()["error"]["param"] == "prompt_logprobs"


async def test_a_stream_has_no_place_for_them() -> None:
    async with chatting() as served:
        response = await chat(served, prompt_logprobs=0, stream=True)
        assert response.status_code == 400
        assert "stream" in response.json()["error"]["message"]
