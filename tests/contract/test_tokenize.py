"""POST /tokenize and /detokenize."""

import httpx
import pytest

from server.chat_template import ChatTemplate
from tests.contract.conftest import Served, serving
from tests.contract.test_errors import error_of, works
from tests.fake_engine import EOS, INFO
from tests.loose import Json
from tests.text_tools import ids_of

USER = [{"role": "user", "content": "hi"}]


async def post(served: Served, path: str, **body: Json) -> httpx.Response:
    return await served.client.post(path, json=body)


async def test_tokens_of_a_text(served: Served) -> None:
    body = (await post(served, "/tokenize", model="default", prompt="é<eos>", return_token_strs=True)).json()
    assert body == {
        "count": 3,
        "max_model_len": INFO.max_model_len,
        "tokens": [0xC3, 0xA9, EOS],
        "token_strs": ["Ã", "©", "<eos>"],
    }
    assert (await post(served, "/tokenize", prompt="")).json()["tokens"] == []
    assert (await post(served, "/tokenize", prompt="a")).json()["token_strs"] is None


async def test_tokens_of_a_conversation() -> None:
    template = ChatTemplate("{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}{{ more }}")
    async with serving(chat_template=template) as served:
        fields = {"chat_template_kwargs": {"more": "?"}}
        assert (await post(served, "/tokenize", messages=USER, **fields)).json()["tokens"] == ids_of("hi!?")
        body = (await post(served, "/tokenize", messages=USER, add_generation_prompt=False)).json()
        assert body["tokens"] == ids_of("hi")


async def test_text_of_tokens(served: Served) -> None:
    body = (await post(served, "/detokenize", model="default", tokens=[0xC3, 0xA9, EOS])).json()
    assert body == {"prompt": "é<eos>"}
    assert (await post(served, "/detokenize", tokens=[])).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": USER}, "messages"),  # no template
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "model": 3}, "model"),
        ("/tokenize", {"prompt": "a", "temperature": 1}, "temperature"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [1], "extra": 1}, "extra"),
    ],
    ids=str,
)
async def test_bad_field(served: Served, path: str, fields: dict[str, object], param: str) -> None:
    absent = {"model": ..., "prompt": ..., "max_tokens": ...}
    assert error_of(await served.post(path, **absent | fields), 400)["param"] == param
    await works(served)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_unknown_model_wrong_type_and_engine_that_is_not_ready(served: Served, path: str) -> None:
    fields = {"prompt": "a"} if path == "/tokenize" else {"tokens": [1]}
    assert error_of(await post(served, path, model="x", **fields), 404)["code"] == "model_not_found"
    response = await served.client.post(path, content=b"{}", headers={"content-type": "text/plain"})
    assert error_of(response, 415)["code"] == "unsupported_media_type"
    served.engine.state = "loading"
    assert error_of(await post(served, path, **fields), 503)["code"] == "engine_loading"
