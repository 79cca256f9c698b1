"""`speed serve FOLDER`, seen by curl-like clients and the `openai` package."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.conftest import ServerProcess, gauges, wait_until
from tests.loose import Field, Json

PROMPTS = ["The water of", "import os\nimport ", "class Queue:\n    def first(self", "    for i in"]
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
# Some seconds of work: four passes a token.
LONG: dict[str, Json] = {
    "model": "default",
    "prompt": "x",
    "max_tokens": 1500,
    "ignore_eos": True,
    "stream": True,
    "speculation": False,
}


def frames(response: httpx.Response) -> list[dict[str, Json]]:
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part.startswith("data: ")]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_the_same_with_speculation_on_and_off_alone_and_together(
    server: ServerProcess, sampling: dict[str, Json]
) -> None:
    def text(speculation: bool, prompt: str) -> str:
        fields = {"prompt": prompt, "max_tokens": 48, "speculation": speculation, "min_tokens": 8, **sampling}
        return str(server.complete(**fields).json()["choices"][0]["text"])

    alone = [text(False, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: text(True, prompt), PROMPTS * 2))
    assert together == alone * 2
    assert all(alone)


def test_a_stream_joined_is_the_text_that_is_given_whole_otherwise(server: ServerProcess) -> None:
    whole = server.complete(max_tokens=64).json()
    streamed = frames(server.complete(max_tokens=64, stream=True, stream_options={"include_usage": True}))
    assert "".join(c["text"] for f in streamed for c in f["choices"]) == whole["choices"][0]["text"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")  # what is cached or drafted may differ
    assert [streamed[-1]["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]


def test_the_openai_package_reads_whole_and_streamed_answers(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["default", "alias"]
        fields: dict[str, Field] = {
            "model": "default",
            "prompt": PROMPTS[1],
            "max_tokens": 24,
            "temperature": 0.0,
        }
        whole = client.completions.create(**fields)
        with client.completions.create(**fields, stream=True) as stream:
            streamed = "".join(chunk.choices[0].text for chunk in stream)
        assert streamed == whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 24 or whole.choices[0].finish_reason == "stop"
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(**{**fields, "model": "nobody"})
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"model": "default"}', 400),
        (b'{"model": "default", "prompt": 5}', 400),
        (b'{"model": "default", "prompt": "x", "max_tokens": -2}', 400),
        (b'{"model": "default", "prompt": [999999]}', 400),
        (json.dumps({"model": "default", "prompt": "x " * 5000}).encode(), 400),
        (b'{"model": "other", "prompt": "x"}', 404),
    ],
)
def test_bad_input_gets_openais_error_and_the_server_goes_on(
    server: ServerProcess, body: bytes, status: int
) -> None:
    response = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert server.complete(max_tokens=2).status_code == 200


def test_the_api_process_has_no_torch_in_it(server: ServerProcess) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{server.worker.pid}/maps").read_text()


def test_a_worker_that_dies_ends_its_requests_with_an_error_and_another_takes_over(checkpoint: Path) -> None:
    with ServerProcess(str(checkpoint)) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=120) as response:
            lines = (line for line in response.iter_lines() if line)
            assert next(lines).startswith("data: {")
            server.worker.kill()
            rest = [line.removeprefix("data: ") for line in lines]
        assert rest[-1] == "[DONE]"
        assert "error" in json.loads(rest[-2])
        server.wait_ready()
        assert server.complete(max_tokens=4).status_code == 200


def test_a_client_that_goes_away_leaves_room_for_the_next(checkpoint: Path) -> None:
    """One place for a sequence: were it not freed, the last one would wait for all tokens of the others."""
    with ServerProcess(str(checkpoint), "--max-num-seqs", "1") as server:
        for _ in range(5):
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=120) as response:
                next(response.iter_lines())
        usage = server.complete(max_tokens=3, ignore_eos=True).json()["usage"]
        assert usage["completion_tokens"] == 3
        assert gauges(server)["speed:generation_tokens_total"] < LONG["max_tokens"]
        wait_until(lambda: gauges(server)["speed:num_requests_running"] == 0)


def test_a_damaged_checkpoint_is_one_line_and_exit_status_two(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    server = ServerProcess("--model", str(tmp_path))
    _, error = server.process.communicate(timeout=60)
    assert server.process.returncode == 2
    assert "model.safetensors" in error
    assert "Traceback" not in error
