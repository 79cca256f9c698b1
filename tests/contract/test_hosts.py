"""By which names a server is addressed: pages of other sites don't reach one that asks for no key."""

import pytest

from tests.contract.conftest import Served, serving
from tests.contract.test_errors import error_of
from tests.loose import Field

LOCAL = [
    "localhost",
    "localhost:8000",
    "LOCALHOST.",
    "127.0.0.1:8000",
    "127.8.9.1",
    "[::1]:8000",
    "a.localhost",
]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "notlocalhost",
]
FOREIGN += ["192.168.0.7:8000", "0.0.0.0", "[::2]", "[::1", ":8000"]


@pytest.mark.parametrize("host", LOCAL)
async def test_local_names_are_served(served: Served, host: str) -> None:
    assert (await served.client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
async def test_names_of_others_are_403_where_nobody_else_guards(served: Served, host: str) -> None:
    """DNS rebinding: a page of evil.example may have 127.0.0.1 for its own address."""
    for path in ("/v1/models", "/health", "/"):
        error = error_of(await served.client.get(path, headers={"host": host}), 403)
        assert error["code"] == "forbidden_host"
        assert "--allowed-hosts" in error["message"]


@pytest.mark.parametrize("options", [{"api_keys": "k"}, {"host": "0.0.0.0"}, {"allowed_hosts": "*"}])
async def test_any_name_is_served_where_a_key_is_asked_for_or_others_are_meant_to_come(
    options: dict[str, Field],
) -> None:
    async with serving(**options) as served:
        headers = {"host": "evil.example", "authorization": "Bearer k"}
        assert (await served.client.get("/v1/models", headers=headers)).status_code == 200


async def test_further_names_may_be_allowed_and_then_hold_everywhere() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        async with serving(host=host, allowed_hosts="Llm.example,*.lan") as served:
            for name, status in (
                *(("llm.example", 200), ("LLM.example:80", 200), ("a.lan", 200), ("a.b.lan", 200)),
                *(("lan", 403), ("xlan", 403), ("a.llm.example", 403), ("localhost", 200), (host, 200)),
            ):
                response = await served.client.get("/v1/models", headers={"host": name})
                assert response.status_code == status, name


async def test_a_request_without_a_name_passes(served: Served) -> None:
    """HTTP/1.0 has none; a browser always sends it."""
    call = served.asgi_call()
    await call.finished()
    assert call.sent[0]["status"] == 200
