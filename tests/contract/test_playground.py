"""GET / and /docs: the pages are served, need nothing from elsewhere, and speak of the API as it is."""

import re
from urllib.parse import urljoin

import pytest

from model.options import POLICIES
from server.routes.playground import FOLDER, NAMES
from server.schemas.chat import ChatChunkChoice, ChatRequest
from server.schemas.completions import CompletionChoice, CompletionRequest
from server.schemas.models import ModelCard
from server.schemas.sampling import StreamOptions
from server.schemas.usage import CompletionTokensDetails
from server.schemas.wave import CommittedToken, Flush, Pass, Wave
from tests.contract.conftest import Served, serving

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
FILES = {"/": "text/html", "/docs": "text/html"}
FILES |= {f"/playground/{name}": TYPES[name[name.index(".") :]] for name in sorted(NAMES)}


def script(name: str) -> str:
    return (FOLDER / f"{name}.js").read_text()


@pytest.mark.parametrize(("path", "media_type"), FILES.items())
async def test_files_are_served_and_refer_to_nothing_outside(
    served: Served, path: str, media_type: str
) -> None:
    response = await served.client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(media_type)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(|\beval\(|innerHTML", response.text)
    if media_type == "text/html":  # the policy forbids what is within the page
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", response.text)


@pytest.mark.parametrize("name", ["nothing.js", "..%2Froutes%2Fplayground.py", "%2Fetc%2Fpasswd", "py.typed"])
async def test_nothing_else_is_served_from_there(served: Served, name: str) -> None:
    assert (await served.client.get(f"/playground/{name}")).status_code == 404


@pytest.mark.parametrize("page", ["", "docs"])
async def test_addresses_are_relative_and_exist_under_a_root_path(page: str) -> None:
    async with serving(root_path="/llm") as served:
        text = (await served.client.get(f"/llm/{page}")).text
        addresses = set(re.findall(r'(?:href|src)="(?!data:|#)([^"]+)"', text))
        for name in sorted(NAMES):
            if name.endswith(".js"):
                source = (await served.client.get(f"/llm/playground/{name}")).text
                addresses |= {f"playground/{other}" for other in re.findall(r'from "\./([^"]+)"', source)}
                addresses |= set(re.findall(r'(?:fetch|request)\("([^"]+)"', source))
                addresses |= set(re.findall(r'"(v1/[^"]+)"', source))
        assert {"v1/models", "v1/completions", "v1/chat/completions", "ready", "openapi.json"} <= addresses
        for address in addresses:
            assert not address.startswith("/")
            status = (await served.client.get(urljoin(f"/llm/{page}", address))).status_code
            assert status == (405 if "completions" in address else 200), address
        without_slash = await served.client.get("/llm")
        assert without_slash.status_code == 307  # else the page's addresses would be those of the parent
        assert without_slash.headers["location"].endswith("/llm/")


def test_the_page_uses_ids_and_fields_that_exist() -> None:
    page, app = (FOLDER / "index.html").read_text(), script("app")
    used = set(re.findall(r'field\("(\w+)"\)', app + script("player")))
    ids = set(re.findall(r'\sid="(\w+)"', page))
    numbers = re.search(r"const NUMBERS = \[(.*)\];", app)
    assert numbers is not None
    sent = set(re.findall(r'"(\w+)"', numbers[1]))
    assert used <= ids
    assert sent <= ids
    asked = sent | {"model", "prompt", "speculation", "stream", "stream_options", "return_token_ids"}
    assert asked <= set(CompletionRequest.model_fields)
    assert asked - {"prompt"} | {"messages"} <= set(ChatRequest.model_fields)
    policies = re.search(r'<select id="draft_policy">(.*?)</select>', page)
    assert policies is not None
    assert set(re.findall(r"<option>(\w+)", policies[1])) == set(POLICIES) - {"none"}


def test_the_page_reads_fields_that_answers_have() -> None:
    run, wave, app = script("run"), script("wave"), script("app")
    options = re.search(r"stream_options: \{(.*)\}", run)
    assert options is not None
    assert set(re.findall(r"(\w+):", options[1])) <= set(StreamOptions.model_fields)
    assert set(re.findall(r"details\.(\w+)", run)) <= set(CompletionTokensDetails.model_fields)
    choice = set(CompletionChoice.model_fields) | {"delta"}
    assert {"finish_reason", "wave"} <= set(re.findall(r"choice\.(\w+)", run)) <= choice
    assert set(re.findall(r"choice\.(\w+)", run)) - {"text"} <= set(ChatChunkChoice.model_fields)
    assert set(re.findall(r"record\.(\w+)", wave)) == set(Wave.model_fields)
    assert set(re.findall(r"pass\.(\w+)", wave)) == set(Pass.model_fields) | {"flushed"}
    assert set(re.findall(r"pass\.flushed\.(\w+)", wave)) <= set(Flush.model_fields)
    assert set(re.findall(r"token\.(\w+)", wave)) == set(CommittedToken.model_fields)
    assert {"id", "supports_chat"} <= set(re.findall(r"card\.(\w+)", app)) <= set(ModelCard.model_fields)


async def test_every_schema_that_the_description_links_to_is_in_it(served: Served) -> None:
    """The page of /docs draws each as a part of its own, and links to it by name."""
    document = (await served.client.get("/openapi.json")).json()
    named = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert named <= set(document["components"]["schemas"])
    examples = re.findall(r'^  "(/[\w/]+)": ', script("docs"), re.MULTILINE)
    assert examples
    assert set(examples) <= set(document["paths"])
