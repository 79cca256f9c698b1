"""The OpenAPI document, held to what the server does by requests that schemathesis makes up.

The suite makes a few hundred; SPEED_FUZZ_REQUESTS=1000 python -m pytest tests/contract/test_openapi.py makes
more, and prints how many with -s. One of schemathesis' checks is left out: that all that the document allows
is accepted. Context length, vocabulary and the like depend on the model.
"""

import os
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks

from server.chat_template import ChatTemplate
from tests.contract.conftest import TEXT, Served, serving, serving_thread
from tests.fake_engine import INFO, FakeEngine
from tests.loose import Json
from tests.text_tools import ids_of

NUM_REQUESTS = int(os.environ.get("SPEED_FUZZ_REQUESTS", "200"))
OPENAI = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
ANTHROPIC = ["/v1/messages", "/v1/messages/count_tokens"]
POSTS = [*OPENAI, *ANTHROPIC]
GETS = ["/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics", "/version"]
DEPENDS_ON_THE_MODEL = [checks.positive_data_acceptance]
statuses: Counter[tuple[str, int]] = Counter()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over a fake engine, in a thread of its own."""
    source = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    engine = FakeEngine(lambda _: ids_of(TEXT), info=msgspec.structs.replace(INFO, max_model_len=2000))
    with serving_thread(engine, ChatTemplate(source, describes_tools=True)) as address:
        yield address
    print(f"\n{sum(statuses.values())} requests:", dict(sorted(statuses.items())))


def fuzz(url: str, path: str, mode: GenerationMode, num_requests: int) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema[path]["POST" if path in POSTS else "GET"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=num_requests,
        deadline=None,
        derandomize=NUM_REQUESTS <= 200,  # the suite's own run is the same every time
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: schemathesis.Case[APIOperation[Json, Json, Json, Json]]) -> None:
        response = case.call(base_url=url)
        statuses[path, response.status_code] += 1
        # A body that is too large is refused too, but by a status that schemathesis doesn't expect.
        too_large = [checks.negative_data_rejection] if response.status_code == 413 else []
        case.validate_response(response, excluded_checks=[*DEPENDS_ON_THE_MODEL, *too_large])

    run()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", POSTS)
def test_made_up_bodies_get_only_documented_answers(url: str, path: str, mode: GenerationMode) -> None:
    before = sum(statuses.values())
    fuzz(url, path, mode, num_requests=NUM_REQUESTS // 8)
    assert sum(statuses.values()) - before >= NUM_REQUESTS // 8
    assert not [status for _, status in statuses if status >= 500]


@pytest.mark.parametrize("path", GETS)
def test_what_can_be_read_is_as_documented(url: str, path: str) -> None:
    fuzz(url, path, GenerationMode.POSITIVE, num_requests=3)


def test_the_made_up_bodies_include_good_ones(url: str) -> None:
    """Else the tests above, which must have run, show little."""
    if not statuses:
        pytest.skip("no requests were made")
    assert sum(statuses[path, 200] for path in POSTS) >= 5, statuses


async def test_every_route_is_documented_and_422_is_not(served: Served) -> None:
    document = (await served.client.get("/openapi.json")).json()
    assert set(document["paths"]) == {*POSTS, *GETS}
    for path, item in document["paths"].items():
        for operation in item.values():
            assert "422" not in operation["responses"]
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    schema = answer["content"]["application/json"]["schema"]
                    name = "AnthropicErrorResponse" if path in ANTHROPIC else "ErrorResponse"
                    assert schema == {"$ref": f"#/components/schemas/{name}"}
        if path in POSTS:
            assert {"400", "404", "413", "415", "503"} <= set(item["post"]["responses"])
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_bodies_are_closed_typed_and_say_what_may_be_null(served: Served) -> None:
    document = (await served.client.get("/openapi.json")).json()
    body = document["components"]["schemas"]["CompletionRequest"]
    assert body["additionalProperties"] is False
    assert set(body["required"]) == {"model", "prompt"}
    fields = body["properties"]
    assert fields["model"] == {"type": "string", "title": "Model", "enum": ["default"]}
    assert fields["n"]["type"] == ["integer", "null"]
    assert (fields["priority"]["minimum"], fields["priority"]["maximum"]) == (-(2**63), 2**63 - 1)
    assert {"prompt", "max_tokens", "speculation", "num_loops", "response_format"} <= set(fields)
    async with serving(allow_unknown_fields=True) as lenient:
        document = (await lenient.client.get("/openapi.json")).json()
        assert document["components"]["schemas"]["CompletionRequest"]["additionalProperties"] is True


async def test_keys_are_documented_where_they_are_asked_for() -> None:
    async with serving(api_keys="k") as served:
        served.client.headers["authorization"] = "Bearer k"
        paths = (await served.client.get("/openapi.json")).json()["paths"]
    for path, item in paths.items():
        for operation in item.values():
            guarded = path not in ("/health", "/ready", "/metrics")
            assert ("security" in operation) == ("401" in operation["responses"]) == guarded
