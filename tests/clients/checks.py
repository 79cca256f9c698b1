"""Runs the checks of one client, in the environment that has it.

    python -m tests.clients.checks MODULE URL CHECKPOINT FOLDER

A check is a function of the module, named `check_...`, that raises where the client and the server don't go
together; its docstring says what it shows. Needs nothing but the standard library. Prints a line of JSON for
each check, and exits with 1 if one has failed.
"""

import asyncio
import importlib
import inspect
import json
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.loose import Json

MODEL = "default"
USER = [{"role": "user", "content": "What is the weather in Oslo?"}]
CITIES = ["Oslo", "Bergen"]
PARAMETERS: dict[str, Json] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TOO_LONG = "word " * 5000  # more than the context of the model holds


class Server(NamedTuple):
    """The server under test, the folder of its model, and one that a check may write to."""

    url: str
    checkpoint: Path
    folder: Path

    @property
    def openai_url(self) -> str:
        """The base of OpenAI's API."""
        return f"{self.url}/v1"

    def post(self, path: str, **fields: object) -> Json:
        """What the server answers without any client between; raises unless it is a success."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            self.url + path, json.dumps({"model": MODEL} | fields).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def chat(self, **fields: object) -> str:
        """The text of a greedy answer to `USER`."""
        asked = {"messages": USER, "temperature": 0, "max_tokens": 24} | fields
        return str(self.post("/v1/chat/completions", **asked)["choices"][0]["message"]["content"])


@contextmanager
def raising(error: type[Exception], words: str) -> Iterator[None]:
    """Within it `error`, and no other, is raised, and speaks of `words`."""
    caught: Exception | None = None
    try:
        yield
    except error as raised:
        caught = raised
    assert type(caught) is error, f"{type(caught).__name__} instead of {error.__name__}"
    assert words in str(caught), str(caught)


def assert_call(name: str, arguments: Json) -> None:
    """The call is one of `TOOL`, as its schema says."""
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "get_weather", name
    assert set(values) == {"city", "days"}, values
    assert values["city"] in CITIES, values
    assert isinstance(values["days"], int), values
    assert values["days"] <= 9, values


def run(check: Callable[[Server], object], server: Server) -> str:
    """What is wrong, or nothing."""
    try:
        result = check(server)
        if inspect.iscoroutine(result):
            asyncio.run(result)
    except Exception:  # whatever a client may raise
        return traceback.format_exc(limit=-6)
    return ""


def main() -> None:
    """Every check of the module, in the order in which they are written."""
    name, url, checkpoint, folder = sys.argv[1:]
    module = importlib.import_module(name)
    server = Server(url, Path(checkpoint), Path(folder))
    checks = [
        check for key, check in vars(module).items() if key.startswith("check_") and check.__module__ == name
    ]
    assert checks, f"{name} has no checks"
    problems = []
    for check in checks:
        problems.append(run(check, server))
        shown = (inspect.getdoc(check) or check.__name__).splitlines()[0].rstrip(".")
        print(json.dumps({"shows": shown, "problem": problems[-1]}), flush=True)
    sys.exit(1 if any(problems) else 0)


if __name__ == "__main__":
    main()
