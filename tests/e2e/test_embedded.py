"""The embedded model starts and answers as the README says. All else is tested with less."""

import json
import re
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from server.chat_template import load_chat_template
from server.settings import embedded_model
from tests.e2e.conftest import ROOT, ServerProcess
from tests.loose import Json
from tests.small_checkpoint import CHAT_TEMPLATE

README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With a chat template of ours if it has none, and a short context: answers end where that is full."""
    template = tmp_path_factory.mktemp("template") / "chat_template.jinja"
    template.write_text(CHAT_TEMPLATE)
    own = load_chat_template(embedded_model()) is not None
    flags = [] if own else ["--chat-template", str(template)]
    with ServerProcess("--max-model-len", "192", *flags) as running:
        yield running


def test_the_curl_commands_of_the_readme_are_answered(embedded: ServerProcess) -> None:
    commands = re.findall(rf"curl {ADDRESS}(\S+) .*?-d '(.*?)'", README, re.DOTALL)
    assert commands
    for path, body in commands:
        answer = httpx.post(f"{embedded.url}{path}", json=json.loads(body), timeout=120)
        assert answer.status_code == 200, answer.text
        assert "choices" in answer.text


def test_the_python_of_the_readme_runs(embedded: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block for block in re.findall(r"\n((?: {4}.*\n)+)", README) if "from openai" in block]
    assert blocks
    for block in blocks:
        exec(re.sub("^    ", "", block, flags=re.MULTILINE).replace(ADDRESS, embedded.url), {})
    assert capsys.readouterr().out


def test_the_logit_lens_of_the_api_page_runs(
    embedded: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(block.splitlines()) <= 21
    exec(block.replace(ADDRESS, embedded.url), {})
    *tokens, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"loop (\d+): 100% of its likeliest tokens are the last loop's", last)
    num_loops = int(last.split()[1].rstrip(":"))
    assert num_loops > 1
    assert {line.count(" | ") for line in tokens[: -num_loops + 1]} == {num_loops}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_joined_is_the_whole_answer_and_that_without_speculation(
    embedded: ServerProcess, path: str
) -> None:
    """And a trained model's early loops predict some of what its last one says."""
    asked = {"prompt": "The capital of France is"} if path == "completions" else {"messages": MESSAGES}
    body = {"model": "default", "max_tokens": 32, "seed": 3, "min_tokens": 8, **asked}

    def post(**fields: object) -> httpx.Response:
        return httpx.post(f"{embedded.url}/v1/{path}", json=body | fields, timeout=120)

    whole, plain = post(draft_policy="recheck").json(), post(speculation=False).json()
    frames = [line.removeprefix("data: ") for line in post(stream=True).text.splitlines() if line]
    assert frames.pop() == "[DONE]"
    streamed = "".join(text_of(choice) for frame in frames for choice in json.loads(frame)["choices"])
    assert streamed == text_of(whole["choices"][0]) == text_of(plain["choices"][0])
    assert whole["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0


def test_a_tool_is_called_where_a_call_is_required() -> None:
    """It was trained on no tools: a grammar makes the call, and the result goes back as text."""
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
    }
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters, "strict": True}}
    question = {"role": "user", "content": "What is the weather in Paris?"}
    with ServerProcess("--max-model-len", "640", "--tool-template", "generic") as running:

        def ask(*messages: Json, **fields: Json) -> Json:
            body = {"model": "default", "tools": [tool], "temperature": 0, "messages": messages} | fields
            return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=120).json()["choices"][
                0
            ]

        choice, plain = (
            ask(question, tool_choice="required", parallel_tool_calls=False, speculation=on)
            for on in (True, False)
        )
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == plain["message"]["tool_calls"][0]["function"]
        arguments = json.loads(call["function"]["arguments"])
        assert (set(arguments), arguments["days"] in {1, 2, 3}) == ({"city", "days"}, True)
        result = {"role": "tool", "tool_call_id": call["id"], "content": "Rain."}
        answer = ask(question, choice["message"], result, max_tokens=20, tool_choice="none")
        assert answer["message"]["content"]


MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


def text_of(choice: dict[str, Json]) -> str:
    """Of a completion, a chat or a piece of its stream."""
    return str(
        choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
    )


def test_the_openai_package_chats(embedded: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{embedded.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(model="default", messages=MESSAGES, max_completion_tokens=16)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
