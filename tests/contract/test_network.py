"""A real uvicorn with the options of the network: TLS."""

import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from server.serve import check_certificate
from server.settings import Settings, SettingsError
from tests.contract.test_shutdown import running
from tests.fake_engine import FakeEngine
from tests.loose import Field
from tests.text_tools import ids_of


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    """A certificate for this machine and its key, as settings."""
    certificate = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    return {"ssl_certfile": chain, "ssl_keyfile": key}


async def test_a_client_that_trusts_the_certificate_is_served_and_plain_http_is_not(
    authority: trustme.CA, files: dict[str, Field]
) -> None:
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    async with running(FakeEngine(lambda _: ids_of("abc")), 1, **files) as (_, url):
        secure = url.replace("http:", "https:")
        async with httpx.AsyncClient(base_url=secure, verify=trust) as client:
            body = {"model": "default", "prompt": "a", "stream": True}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200
            assert response.text.endswith("data: [DONE]\n\n")
        async with httpx.AsyncClient(base_url=url) as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/health")


@pytest.mark.parametrize("wrong", ["absent", "not a certificate", "key of another", "key alone"])
def test_files_that_cannot_work_are_refused_before_anything_is_loaded(
    files: dict[str, Field], tmp_path: Path, wrong: str
) -> None:
    if wrong == "absent":
        files["ssl_certfile"] = tmp_path / "absent.pem"
    elif wrong == "not a certificate":
        files["ssl_certfile"].write_text("hello")
    elif wrong == "key of another":
        trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(files["ssl_keyfile"])
    else:
        del files["ssl_certfile"]
    with pytest.raises(SettingsError, match="--ssl-certfile"):
        check_certificate(Settings(**files))


def test_files_that_work_are_taken(files: dict[str, Field]) -> None:
    check_certificate(Settings(**files))
    check_certificate(Settings())
