"""Who may call: API keys, pages of other origins, and what stays open."""

import base64
import hmac
from pathlib import Path

import pytest
from starlette.types import Message

from server.settings import Settings, SettingsError
from tests.contract.conftest import Served, serving
from tests.contract.test_errors import error_of
from tests.fake_engine import FakeEngine
from tests.text_tools import ids_of

KEYS = "first-key,second-key"
OPEN = ["/health", "/ready", "/metrics"]
GUARDED = ["/", "/v1/models", "/v1/models/default", "/version", "/docs", "/openapi.json", "/nothing"]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", GUARDED)
async def test_without_a_key_everything_is_401(path: str) -> None:
    async with serving(api_keys=KEYS) as served:
        response = await served.client.get(path)
        error = error_of(response, 401)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert (await served.client.get(path, headers=bearer("second-key"))).status_code != 401


@pytest.mark.parametrize(
    "authorization",
    [
        *("", "Bearer", "Bearer ", "Bearer x", "Bearer first-keyy", "Bearer first-key,second-key"),
        *("first-key", "Basic first-key", "Basic !", "Digest first-key"),
    ],
)
async def test_a_wrong_key_does_not_reach_the_engine_and_a_right_one_does(authorization: str) -> None:
    async with serving(api_keys=KEYS) as served:
        served.client.headers["authorization"] = authorization
        error_of(await served.post(), 401)
        error_of(await served.post(stream=True), 401)
        assert served.engine.requests == []
        for key in KEYS.split(","):
            served.client.headers.update(bearer(key))
            assert (await served.post()).status_code == 200


async def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    original = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return original(one, other)

    monkeypatch.setattr("server.auth.hmac.compare_digest", compare)
    async with serving(api_keys="a,b,c") as served:
        for key in ("a", "c", "d"):
            compared.clear()
            await served.client.get("/version", headers=bearer(key))
            assert len(compared) == 2 * 3, "what either header brings, with each key"


async def test_a_body_is_not_read_without_a_key() -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    async with serving(api_keys=KEYS) as served:
        await served.app(scope, receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("path", OPEN)
async def test_probes_need_no_key(path: str) -> None:
    async with serving(api_keys=KEYS) as served:
        assert (await served.client.get(path)).status_code == 200


async def test_metrics_may_be_guarded() -> None:
    async with serving(api_keys=KEYS, protect_metrics=True) as served:
        error_of(await served.client.get("/metrics"), 401)
        assert (await served.client.get("/metrics", headers=bearer("first-key"))).status_code == 200
        assert (await served.client.get("/health")).status_code == 200


async def test_a_browser_is_asked_for_the_key_and_sends_it_as_a_password() -> None:
    async with serving(api_keys=KEYS) as served:
        response = await served.client.get("/docs", headers={"accept": "text/html,*/*"})
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"].startswith("Basic ")
        for user in ("", "anyone"):
            token = base64.b64encode(f"{user}:second-key".encode()).decode()
            response = await served.client.get("/docs", headers={"authorization": f"Basic {token}"})
            assert response.status_code == 200


async def test_no_key_is_asked_for_unless_there_are_some(served: Served) -> None:
    assert (await served.post()).status_code == 200


async def test_keys_of_a_file_and_of_the_environment_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# staff\n\nfrom-file\n  indented  \n")
    monkeypatch.setenv("SPEED_API_KEYS", "from-environment")
    async with serving(api_key_file=file) as served:
        for key in ("from-file", "indented", "from-environment"):
            assert (await served.client.get("/version", headers=bearer(key))).status_code == 200
        assert (await served.client.get("/version", headers=bearer("# staff"))).status_code == 401


@pytest.mark.parametrize(
    "content", [b"", b"# none\n", b"two words\n", b"\xff\xfe\n", "schl\u00fcssel\n".encode()]
)
def test_a_useless_file_of_keys_does_not_open_the_server(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match="--api-key-file"):
        Served(FakeEngine(lambda _: ids_of("a")), Settings(api_key_file=file))
    with pytest.raises(SettingsError, match="No such file"):
        Served(FakeEngine(lambda _: ids_of("a")), Settings(api_key_file=tmp_path / "absent"))


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type",
    }


async def test_pages_of_other_origins_may_not_call_unless_they_are_named() -> None:
    async with serving() as served:
        response = await served.client.options("/v1/completions", headers=preflight("https://a.example"))
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert "access-control-allow-origin" not in response.headers
    async with serving(cors_origins="https://a.example,https://b.example", api_keys=KEYS) as served:
        response = await served.client.options("/v1/completions", headers=preflight("https://b.example"))
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://b.example"
        assert "authorization" in response.headers["access-control-allow-headers"].lower()
        headers = {"origin": "https://b.example"}
        refused = await served.client.get("/version", headers=headers)
        assert error_of(refused, 401)
        assert refused.headers["access-control-allow-origin"] == "https://b.example"
        answered = await served.client.get("/version", headers=headers | bearer("first-key"))
        assert "X-Request-Id" in answered.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    "headers", [preflight("https://evil.example"), preflight("https://a.example", "PUT")]
)
async def test_a_foreign_page_is_403(headers: dict[str, str]) -> None:
    async with serving(cors_origins="https://a.example") as served:
        response = await served.client.options("/v1/completions", headers=headers)
        assert error_of(response, 403)["code"] == "forbidden_origin"
        assert "access-control-allow-origin" not in response.headers
        assert "Origin" in response.headers["vary"]


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_root_path_may_be_cut_off_by_the_proxy_or_not(prefix: str) -> None:
    async with serving(root_path="/llm", api_keys=KEYS) as served:
        assert (await served.client.get(f"{prefix}/health")).status_code == 200
        error_of(await served.client.get(f"{prefix}/version"), 401)
        assert (await served.client.get(f"{prefix}/version", headers=bearer("first-key"))).status_code == 200
        docs = await served.client.get(f"{prefix}/docs", headers=bearer("first-key"))
        assert 'href="openapi.json"' in docs.text  # beside the page, wherever that is
        described = await served.client.get(f"{prefix}/openapi.json", headers=bearer("first-key"))
        assert described.json()["servers"] == [{"url": "/llm"}]


async def test_a_path_that_only_begins_like_the_root_path_is_guarded() -> None:
    async with serving(root_path="/llm", api_keys=KEYS) as served:
        for path in ("/llmx/health", "/health/", "//health", "/health%2f", "/llm/llm/health", "/v1/health"):
            assert (await served.client.get(path)).status_code == 401, path
