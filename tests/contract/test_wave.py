"""`stream_options.include_wave`: what each pass did comes with the chunks, and changes nothing else."""

import pytest

from server.schemas.wave import Wave
from tests.contract.conftest import TEXT, Served
from tests.contract.test_chat import chatting
from tests.loose import Json
from tests.text_tools import ids_of

WAVE = {"include_wave": True}


def waves(chunks: list[Json], index: int = 0) -> list[Wave]:
    """Those of one choice, each checked for its form."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    found = [choice["wave"] for choice in choices if "wave" in choice]
    return [Wave.model_validate(wave, strict=False, extra="forbid") for wave in found]


async def test_chunks_tell_every_pass_with_the_texts_of_its_tokens(served: Served) -> None:
    found = waves(await served.chunks(prompt=[1, 2, 3], stream_options=WAVE))
    ids = ids_of(TEXT)
    assert [token.token_id for wave in found for one in wave.passes for token in one.committed] == ids
    assert [one.position for wave in found for one in wave.passes] == list(range(3, 3 + len(ids)))
    first = found[0]
    assert (first.num_loops, first.omitted) == (4, 0)
    assert first.passes[0].model_dump() == {
        "runs": [(2, 1, 4)],
        "position": 3,
        "committed": [{"token_id": ids[0], "agreed": 1, "guesses": [(1, 0), (4, ids[0])]}],
        "drafts": [1],
        "flushed": {"position": 3, "depth": 1},
    }
    assert first.texts == {"0": "\0", "1": "\1", str(ids[0]): "G"}


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stop": "The"}, {"logprobs": 1, "max_tokens": 5}], ids=str)
async def test_all_else_is_as_without_it(served: Served, fields: dict[str, Json]) -> None:
    def text_of(chunks: list[Json]) -> dict[int, str]:
        texts: dict[int, str] = {}
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        return texts

    plain = await served.chunks(**fields)
    told = await served.chunks(stream_options=WAVE, **fields)
    assert text_of(told) == text_of(plain)
    assert told[-1]["choices"][0]["finish_reason"] == plain[-1]["choices"][0]["finish_reason"]
    assert not waves(plain)
    for index in text_of(told):
        assert waves(told, index)


async def test_chats_have_it_too() -> None:
    async with chatting() as served:
        body = {"prompt": ..., "messages": [{"role": "user", "content": "hi"}], "stream": True}
        answer = await served.post("/v1/chat/completions", stream_options=WAVE, **body)
        chunks = served.frames(answer)
        found = waves(chunks)
        assert "wave" not in chunks[0]["choices"][0]  # which brings the role alone
        assert found
        assert all(wave.passes for wave in found)


async def test_it_needs_a_stream(served: Served) -> None:
    answer = await served.post(stream_options=WAVE)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options"
    answer = await served.post(stream=True, stream_options={"include_wave": "yes"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options"
    assert "include_wave" in answer.json()["error"]["message"]


async def test_the_engine_is_asked_only_if_the_client_asks(served: Served) -> None:
    for options in (None, {"include_usage": True}, WAVE):
        await served.chunks(stream_options=options)
    assert [request.include_wave for request in served.engine.requests] == [False, False, True]
