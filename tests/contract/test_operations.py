"""/v1/models, /health, /ready, /version and X-Request-Id."""

import pytest

from server.chat_template import ChatTemplate
from tests.contract.conftest import Served, serving


async def test_models_lists_every_name() -> None:
    async with serving(served_model_name="main,org/alias") as served:
        body = (await served.client.get("/v1/models")).json()
        assert body["object"] == "list"
        assert [card["id"] for card in body["data"]] == ["main", "org/alias"]
        card = (await served.client.get("/v1/models/org/alias")).json()
        assert card == body["data"][1]
        assert card == {
            "id": "org/alias",
            "object": "model",
            "created": card["created"],
            "owned_by": "speed",
            "supports_chat": False,
            "max_model_len": 200,
            "num_loops": 4,
            "draft_depths": [1, 2],
            "draft_policy": "single",
        }
        for name in ("main", "org/alias"):
            assert (await served.post(model=name)).json()["model"] == name
        assert (await served.post(model="default")).status_code == 404


async def test_models_while_loading_have_openais_fields_and_whether_they_chat(served: Served) -> None:
    served.engine.state = "loading"
    card = (await served.client.get("/v1/models/default")).json()
    assert set(card) == {"id", "object", "created", "owned_by", "supports_chat"}


async def test_a_model_with_a_template_supports_chat() -> None:
    async with serving(chat_template=ChatTemplate("{{ messages[0].content }}")) as served:
        assert (await served.client.get("/v1/models/default")).json()["supports_chat"] is True


async def test_health_ready_version(served: Served) -> None:
    for path in ("/health", "/ready", "/version"):
        assert (await served.client.get(path)).status_code == 200
    assert (await served.client.get("/version")).json()["version"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/default", "/metrics", "/"])
async def test_head_is_get_without_the_body(served: Served, path: str) -> None:
    head, whole = await served.client.head(path), await served.client.get(path)
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    assert int(head.headers["content-length"]) > 0
    assert head.headers["content-type"] == whole.headers["content-type"]


async def test_head_of_what_only_takes_post_is_405(served: Served) -> None:
    assert (await served.client.head("/v1/completions")).status_code == 405


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("x" * 129, False), ("a b", False), ("", False)]
)
async def test_request_id_is_taken_or_made(served: Served, given: str, kept: bool) -> None:
    response = await served.client.get("/health", headers={"x-request-id": given})
    assert (response.headers["x-request-id"] == given) == kept
    assert response.headers["x-request-id"]
