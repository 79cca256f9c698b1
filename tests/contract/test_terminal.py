"""`speed chat` and `speed complete`: what a terminal shows, what a pipe gets, and what Ctrl-C stops."""

import asyncio
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.answers import Shown
from cli.connection import Connection
from cli.main import main
from server.app import create_app
from server.chat_template import ChatTemplate
from server.serve import DrainingServer, uvicorn_config
from server.settings import Settings
from tests.contract.conftest import TEXT, until
from tests.fake_engine import STATS, FakeEngine
from tests.loose import Field
from tests.text_tools import byte_codec, ids_of

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}")


@asynccontextmanager
async def running(engine: FakeEngine, **options: Field) -> AsyncIterator[str]:
    """A real server over a fake engine; its address."""
    settings = Settings(port=0, log_level="critical", **options)
    app = create_app(engine, byte_codec(), settings, TEMPLATE)
    server = DrainingServer(uvicorn_config(app, settings), app.state.server, 0)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(10):
            await task


async def speed(*words: str, said: str = "", **variables: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "cli.main", *words],
        input=said.encode(),
        capture_output=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **variables},
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def prompts(engine: FakeEngine) -> list[str]:
    return [bytes(request.prompt_token_ids).decode() for request in engine.requests]


async def test_a_completion_is_the_text_alone_and_its_cost_beside_it() -> None:
    engine = FakeEngine(lambda _: ids_of(TEXT), delay=0.001)
    async with running(engine) as url:
        status, out, err = await speed("complete", "Once upon", "--url", url, "--seed", "7", "--top-p", "0.5")
        assert (status, out) == (0, TEXT + "\n")
        passes = STATS.passes / (len(ids_of(TEXT)) - 1)
        assert f"({len(ids_of(TEXT))} tokens, {passes:.2f} passes per token, " in err
        assert "tokens/s" in err
        status, out, _ = await speed(
            "complete", "--url", f"{url}/v1/", "--max-tokens", "2", said="From a pipe.\n"
        )
        assert (status, out) == (0, "Gr\n")
    assert prompts(engine) == ["Once upon", "From a pipe.\n"]
    assert (engine.requests[0].sampling.seed, engine.requests[0].sampling.top_p) == (7, 0.5)
    assert engine.requests[1].max_tokens == 2


async def test_a_reader_that_has_enough_is_no_traceback() -> None:
    engine = FakeEngine(lambda _: ids_of("line\n" * 30), delay=0.005)
    async with running(engine) as url:
        command = f"{sys.executable} -m cli.main complete x --max-tokens 150 --url {url} | head -1"
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            shell=True,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        await until(lambda: engine.aborted)
    assert (done.stdout, done.stderr) == ("line\n", "")


async def test_a_conversation_by_pipe_goes_on_until_quit() -> None:
    engine = FakeEngine(lambda request: ids_of(f"answer {len(request.prompt_token_ids)}."))
    async with running(engine) as url:
        lines = "hi\n\nmore\n/clear\nagain\n/quit\nnever\n"
        status, out, _ = await speed("chat", "--url", url, "--system", "S", "--no-speculation", said=lines)
    assert prompts(engine) == ["s:S;u:hi;", "s:S;u:hi;a:answer 9.;u:more;", "s:S;u:again;"]
    assert out == "answer 9.\nanswer 28.\nanswer 12.\n"
    assert status == 0
    assert not any(request.speculation for request in engine.requests)


async def test_a_message_that_is_refused_is_said_and_taken_back() -> None:
    engine = FakeEngine(lambda _: ids_of("yes"))
    async with running(engine, api_keys=["secret"]) as url:
        status, out, err = await speed("chat", "--url", url, said="hi\n")
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert "API key" in err
        long = "x" * 300
        words = ("chat", "--url", url, "--model", "default")
        status, out, err = await speed(*words, said=f"{long}\nhi\n", OPENAI_API_KEY="secret")
        assert (status, out) == (1, "yes\n")
        assert "maximum context length" in err
        status, _, err = await speed(
            "complete", "x", "--url", url, "--model", "none", OPENAI_API_KEY="secret"
        )
        assert status == 1
        assert "'none' does not exist" in err
        assert "Traceback" not in err
    assert prompts(engine) == ["u:hi;"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nowhere", "http://[", "http://a\x00b"])
async def test_a_server_that_is_not_there_is_one_line_and_status_2(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "\x00" not in url:
        assert main(["complete", "x", "--url", url]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert url in error


class Terminal:
    """`speed chat` at a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._side, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "chat", *words],
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(other)
        os.set_blocking(self._side, False)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    async def until(self, text: str) -> None:
        """Reads until `text` was shown."""
        async with asyncio.timeout(30):
            while text not in self.shown:
                try:
                    self.shown += os.read(self._side, 10_000).decode(errors="replace")
                except BlockingIOError:
                    await asyncio.sleep(0.01)

    async def end(self) -> int:
        async with asyncio.timeout(30):
            status = await asyncio.to_thread(self.process.wait)
        os.close(self._side)
        return status


async def test_ctrl_c_stops_an_answer_and_not_the_program() -> None:
    engine = FakeEngine(lambda _: ids_of("slowly " * 20), delay=0.02)
    async with running(engine) as url:
        terminal = Terminal("--url", url)
        try:
            await terminal.until("> ")
            terminal.process.send_signal(signal.SIGINT)  # at the prompt it says how to leave
            await terminal.until("(/clear forgets")
            terminal.type("hi\n")
            await terminal.until("slowly")
            terminal.process.send_signal(signal.SIGINT)
            await terminal.until("(stopped)")
            await until(lambda: engine.aborted)
            engine.delay = 0
            terminal.type("more\n")
            await terminal.until("passes per token")
            terminal.type("/quit\n")
            assert await terminal.end() == 0
        finally:
            terminal.process.kill()
            terminal.process.wait()
    first, second = prompts(engine)
    assert first == "u:hi;"
    assert second.startswith("u:hi;a:slowly")  # what was shown was said
    assert second.endswith(";u:more;")


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def chunks(
    *deltas: dict[str, str], closed: list[bool] | None = None
) -> Generator[dict[str, Any], None, None]:
    try:
        for delta in deltas:
            yield {"choices": [{"delta": delta}]}
        yield {"choices": [], "usage": {"completion_tokens": len(deltas)}}
    finally:
        if closed is not None:
            closed.append(True)


def test_a_model_cannot_act_upon_the_terminal() -> None:
    text = "a\x1b[2Jb\x07\x9bc\td\ne"
    for output, shown in ((Tty(), "a\ufffd[2Jb\ufffd\ufffdc\td\ne\n"), (io.StringIO(), text + "\n")):
        assert Shown(output).show(chunks({"content": text}))
        assert output.getvalue() == shown


def test_thoughts_are_shown_on_a_terminal_and_left_out_of_a_pipe() -> None:
    thought, answer = {"reasoning_content": "hm"}, {"content": "yes"}
    tty, pipe = Tty(), io.StringIO()
    for output in (tty, pipe):
        shown = Shown(output)
        assert shown.show(chunks(thought, answer))
        assert shown.text == "yes"
    assert "hm" in tty.getvalue()
    assert pipe.getvalue() == "yes\n"


def test_a_server_that_counts_no_passes_is_shown_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert Shown(io.StringIO()).show(chunks({"content": "a"}, {"content": "b"}))
    said = capsys.readouterr().err
    assert said.startswith("(2 tokens, ")
    assert "passes" not in said


def test_a_stream_as_other_servers_write_it_is_read() -> None:
    """Without a blank behind the colon, and with null for no choices: the text was lost, or a traceback."""
    lines = ['data:{"choices":[{"delta":{"content":"a"}}]}', 'data:{"choices":null}', "data:[DONE]"]
    answer = httpx.Response(200, text="\n\n".join(lines) + "\n\n")
    with httpx.Client(transport=httpx.MockTransport(lambda _: answer), base_url="http://a") as client:
        shown = Shown(io.StringIO())
        assert shown.show(Connection(client, "m").stream("/v1/chat/completions", {}))
    assert shown.text == "a"


def test_an_interrupted_answer_ends_its_request() -> None:
    closed: list[bool] = []

    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if text == "b":
                raise KeyboardInterrupt
            return super().write(text)

    output = Interrupting()
    assert not Shown(output).show(chunks({"content": "a"}, {"content": "b"}, {"content": "c"}, closed=closed))
    assert closed == [True]
    assert output.getvalue() == "a\n"
