"""llm: its command line with a model of extra-openai-models.yaml."""

import json
import os
import subprocess
import sys

from tests.clients.checks import MODEL, USER, Server

PROMPT = USER[0]["content"]
MODELS = """\
- model_id: speed
  model_name: {model}
  api_base: {url}
  supports_schema: true
  supports_tools: true
- model_id: speed-text
  model_name: {model}
  api_base: {url}
  completion: true
"""
SCHEMA = {"type": "object", "properties": {"days": {"type": "integer", "maximum": 9}}, "required": ["days"]}
FUNCTION = "def get_weather(city: str) -> str:\n    return 'rain'"


def run(server: Server, *arguments: str, fails: bool = False) -> tuple[str, str]:
    """What the command prints, and what it tells beside it."""
    (server.folder / "extra-openai-models.yaml").write_text(MODELS.format(model=MODEL, url=server.openai_url))
    environment = {**os.environ, "LLM_USER_PATH": str(server.folder), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout.removesuffix("\n"), done.stderr


def greedy(server: Server, *arguments: str, model: str = "speed") -> str:
    """The answer to the prompt."""
    return told(server, *arguments, model=model)[0]


def told(server: Server, *arguments: str, model: str = "speed") -> tuple[str, str]:
    """The answer, and what is told beside it."""
    return run(server, "-m", model, "-o", "temperature", "0", "-o", "max_tokens", "24", *arguments, PROMPT)


def check_chat(server: Server) -> None:
    """Chat, streamed and whole, with its usage"""
    for arguments in ([], ["--no-stream"]):
        said, beside = told(server, "--usage", *arguments)
        assert said == server.chat()
        assert "24 output" in beside, beside


def check_conversations(server: Server) -> None:
    """A conversation that goes on, with a system prompt"""
    first = greedy(server, "--system", "Be brief.")
    second = greedy(server, "--continue")
    history = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": first},
        *USER,
    ]
    assert second == server.chat(messages=history)


def check_schemas(server: Server) -> None:
    """Structured output with --schema"""
    said, _ = run(server, "-m", "speed", "-o", "seed", "3", "--schema", json.dumps(SCHEMA), PROMPT)
    assert json.loads(said)["days"] <= 9


def check_tools(server: Server) -> None:
    """A request with a tool that the model may call"""
    assert greedy(server, "--functions", FUNCTION)


def check_completions(server: Server) -> None:
    """A model with `completion: true`"""
    direct = server.post("/v1/completions", prompt=PROMPT, max_tokens=24, temperature=0)
    assert greedy(server, model="speed-text") == direct["choices"][0]["text"]


def check_errors(server: Server) -> None:
    """A complaint is shown to the user"""
    _, beside = run(server, "-m", "speed", "-o", "max_tokens", "5000", PROMPT, fails=True)
    assert "maximum context length is 2048 tokens" in beside
