"""Every command that README and docs name: `--help` works with the runtime alone, and mistakes are one line.

No model runs here; what is looked at is how a command begins and how it ends. All run one after the other in
one process, since importing torch takes longer than all that they do.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# What a user who installed the package alone doesn't have.
OPTIONAL = ("gguf", "matplotlib", "psutil", "transformers", "httpx", "pytest", "openai")
RUN_ALL = f"""
import contextlib, io, json, runpy, sys, traceback
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # importing any of these is an ImportError
ends = {{}}
for command in json.load(sys.stdin):
    module, *sys.argv[1:] = command.split()
    sys.modules.pop(module, None)
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            status = 1
            traceback.print_exc()
    ends[command] = status, out.getvalue(), err.getvalue()
json.dump(ends, sys.stdout)
"""
PEERS = {"peer_llama", "peer_ours", "peer_transformers"}  # without options: `bench.peers` starts them
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "bench").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8") and path.stem not in PEERS
)
BENCH = (f"bench {name} " for name in ("latency", "throughput", "serve"))
SPEED = ("", "serve ", "chat ", "complete ", "inspect ", "train ", "train distill ", *BENCH)
HELP = {
    **{f"bench.{name} --help": f"usage: python -m bench.{name}" for name in BENCHMARKS},
    **{f"cli.main {words}--help": f"usage: speed {words}".rstrip() for words in SPEED},
}

MISTAKES = {
    "bench.soak --model nowhere": "'nowhere'",
    "bench.soak --num-requests 0": "--num-requests: '0'",
    "bench.soak --kv-cache-tokens 100": "--kv-cache-tokens: '100' is not a whole number of at least 164",
    "bench.exactness --model nowhere": "'nowhere'",
    "bench.determinism --model nowhere": "'nowhere'",
    "bench.policies --model nowhere": "'nowhere'",
    "bench.policies --plot plot.svg": "matplotlib",
    "bench.oracle --model nowhere": "'nowhere'",
    "bench.oracle --agreement 1.5": "--agreement: '1.5' is not a number from 0 to 1",
    "bench.oracle --num-prompts 3 --requests 2": "--num-prompts 3 is no multiple of --requests 2",
    "bench.rows --model nowhere": "'nowhere'",
    "bench.rows --model nowhere --threads -1": "--threads: '-1'",
    "bench.clients --model nowhere": "exit status 2",
    "bench.clients --good none": "--good: 'none'",
    "bench.api_overhead --clients -1": "--clients: '-1'",
    "bench.make_checkpoint /proc/nowhere": "/proc/nowhere",
    "bench.make_checkpoint out --set num_hidden_layers": "'num_hidden_layers' is not FIELD=JSON",
    "bench.questions --url http://127.0.0.1:9": "no server answers at http://127.0.0.1:9",
    "bench.questions --url nowhere": "nowhere",
    "bench.questions --output nowhere/page.md": "there is no folder 'nowhere'",
    "bench.depth_for_free measure --runs nowhere": "nowhere",
    "bench.depth_for_free train --runs nowhere --depths 2,x": "--depths: 'x'",
    "bench.encoder_decoder measure --runs nowhere": "nowhere",
    "bench.encoder_decoder train --runs nowhere --rounds 0": "--rounds: '0'",
    "cli.main bench latency --model nowhere": "'nowhere'",
    "cli.main bench latency --device tpu": "'tpu'",
    "cli.main bench latency --draft-depths 0": "--draft-depths: '0'",
    "cli.main bench throughput --model nowhere": "'nowhere'",
    "cli.main bench throughput --concurrency 1,0": "--concurrency: '0'",
    "cli.main bench throughput --row-budget few": "--row-budget: 'few'",
    "cli.main bench throughput --plot plot.svg": "matplotlib",
    "cli.main bench serve --goodput ttft": "'ttft' is not METRIC:MILLISECONDS",
    "cli.main bench serve --request-rate 0": "'0' is not a number above 0, or inf",
    "cli.main bench serve --prompts nowhere": "nowhere",
    "cli.main bench serve --percentiles 101": "'101' is not a list of numbers from 0 to 100",
    "cli.main train --output run --recipe nowhere": "nowhere",
    "cli.main train --output run --corpus nowhere": "nowhere",
    "cli.main train --output /proc/run": "/proc/run",
    "cli.main train distill train --run run --teacher nowhere": "nowhere",
    "cli.main inspect nowhere": "'nowhere'",
    "cli.main inspect --device tpu": "'tpu'",
    "cli.main inspect --text nowhere": "nowhere",
}


# Shown to readers, but not begun here: how such a command begins, and why not.
NOT_RUN = {
    "pip install": "downloads packages",
    "git clone": "downloads the project",
    "cd speed-serve": "is that download's folder",
    "python3 -m venv": "makes a virtual environment, before anything of the project is there",
    ". .venv/bin/activate": "changes the shell that it is typed into",
    "docker ": "needs Docker; tests/contract/test_deployment.py reads what it would run",
    "curl ": "needs a server; tests/e2e/test_server.py sends such requests",
    "scripts/": "runs all tests, this one among them",
    "python -m model.passes.native.build": "compiles for half a minute; tests of native passes need it done",
    "python -m model.checkpoint.convert_tokenizer": "has no options; test_old_tokenizers.py converts",
    "python -m model.worker": "is started by the server alone, as tests/unit/test_worker.py does",
    "python -m server": "tests/contract/test_cli.py runs it",
    "python scripts/screenshots.py": "needs a server and Chromium, as tests/e2e/test_page.py does",
    "python scripts/arrows.py": "tests/unit/test_docs.py compares the graph that it prints",
}
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "bench" / "results" / "README.md",
)
PROGRAMS = r"(?:speed|python3?|pip|git|docker|curl|scripts/\w+|\.)"


def shown_commands() -> list[str]:
    """The command lines of the pages: indented ones and quoted ones, each part of a chain by itself."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    lines = re.findall(rf"^ {{4}}({PROGRAMS} .+|scripts/\w+)$", text, re.MULTILINE)
    lines += re.findall(rf"`((?!\.){PROGRAMS} [^`\n]+)`", text)
    parts = (part.split(" # ")[0].strip(" &") for line in lines for part in line.split("&&"))
    return sorted({part for part in parts if "..." not in part})


def help_of(command: str) -> str | None:
    """What of HELP begins as the command does, options and arguments left out; None for another program."""
    words = re.match(r"(?:speed|python -m cli\.main)((?: [a-z]+)*)", command)
    if words:
        known = [name.strip() for name in SPEED if f"{words[1]} ".startswith(f" {name}")]
        return f"cli.main {max(known, key=len)} --help".replace("  ", " ")
    bench = re.match(r"python -m (bench\.\w+)", command)
    return bench and f"{bench[1]} --help"


class End(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    """The end of every command, by its words."""
    commands = [*HELP, *MISTAKES]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_ALL],
        input=json.dumps(commands),
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    return {command: End(*end) for command, end in json.loads(done.stdout).items()}


def test_the_docs_name_no_benchmark_that_is_not_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"python -m bench\.(\w+)", text))
    assert {"attack", "exactness"} <= named <= set(BENCHMARKS)
    assert len(BENCHMARKS) > 8


def test_every_command_that_is_shown_is_begun_here_or_has_a_reason_why_not() -> None:
    commands = shown_commands()
    assert {"speed serve", "python -m bench.soak"} <= set(commands)
    others = [command for command in commands if help_of(command) not in HELP]
    assert not [command for command in others if not command.startswith(tuple(NOT_RUN))]
    assert not [start for start in NOT_RUN if not any(command.startswith(start) for command in others)]


@pytest.mark.parametrize("command", HELP)
def test_help_needs_nothing_optional(ends: dict[str, End], command: str) -> None:
    """bench.clients needed psutil, which only the tests bring."""
    assert ends[command].status == 0, ends[command].err
    assert ends[command].out.startswith(HELP[command])


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2(ends: dict[str, End], command: str) -> None:
    end = ends[command]
    assert end.status == 2, end.err
    assert "Traceback" not in end.err
    *before, last = end.err.strip().splitlines()
    assert MISTAKES[command] in last, end.err
    assert not before or before[0].startswith("usage:"), end.err  # as argparse does
