"""GET /: the page is served, needs nothing from elsewhere, and speaks of the API as it is."""

import re

import pytest

from server.routes.playground import FOLDER
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.models import ModelCard
from server.schemas.usage import CompletionTokensDetails
from tests.contract.conftest import Served, serving

FILES = {"/": "text/html", "/playground/app.js": "text/javascript", "/playground/style.css": "text/css"}


@pytest.mark.parametrize(("path", "media_type"), FILES.items())
async def test_files_are_served_and_refer_to_nothing_outside(
    served: Served, path: str, media_type: str
) -> None:
    response = await served.client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(media_type)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(|\beval\(", response.text)
    if path == "/":  # the policy forbids what is within the page
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", response.text)


async def test_addresses_are_relative_and_exist_under_a_root_path() -> None:
    async with serving(root_path="/llm") as served:
        page = (await served.client.get("/llm/")).text
        script = (await served.client.get("/llm/playground/app.js")).text
        addresses = re.findall(r'(?:href|src)="(?!data:)([^"]+)"', page) + re.findall(r'"(v1/[^"]+)"', script)
        assert len(addresses) >= 7
        for address in addresses:
            assert not address.startswith("/")
            status = (await served.client.get(f"/llm/{address}")).status_code
            assert status in ({405} if "completions" in address else {200}), address
        without_slash = await served.client.get("/llm")
        assert without_slash.status_code == 307  # else the page's addresses would be those of the parent
        assert without_slash.headers["location"].endswith("/llm/")


def test_the_page_uses_fields_and_ids_that_exist() -> None:
    script, page = (FOLDER / "app.js").read_text(), (FOLDER / "index.html").read_text()
    ids = set(re.findall(r'field\("(\w+)"\)', script))
    assert ids == set(re.findall(r'\sid="(\w+)"', page))
    body = script[script.index("function requestBody") : script.index("// The parsed frames")]
    sent = set(re.findall(r"^    (\w+):", body, re.MULTILINE))
    assert {"model", "speculation", "stream"} <= sent <= set(CompletionRequest.model_fields)
    assert sent <= set(ChatRequest.model_fields)
    assert set(re.findall(r"details\.(\w+)", script)) <= set(CompletionTokensDetails.model_fields)
    assert {"id", "supports_chat"} <= set(re.findall(r"card\.(\w+)", script)) <= set(ModelCard.model_fields)
