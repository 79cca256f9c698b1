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
BENCHMARKS = sorted(
    path.stem for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)
SPEED = ("", "serve ", "inspect ", "train ", "train distill ", "bench latency ", "bench throughput ")
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
    "bench.determinism_cost --model nowhere": "'nowhere'",
    "bench.policies --model nowhere": "'nowhere'",
    "bench.policies --plot plot.svg": "matplotlib",
    "bench.rows --model nowhere": "'nowhere'",
    "bench.rows --model nowhere --threads 0": "--threads: '0'",
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
    "cli.main bench latency --model nowhere": "'nowhere'",
    "cli.main bench latency --device tpu": "'tpu'",
    "cli.main bench latency --draft-depths 0": "--draft-depths: '0'",
    "cli.main bench throughput --model nowhere": "'nowhere'",
    "cli.main bench throughput --concurrency 1,0": "--concurrency: '0'",
    "cli.main bench throughput --row-budget few": "--row-budget: 'few'",
    "cli.main bench throughput --plot plot.svg": "matplotlib",
    "cli.main train --output run --recipe nowhere": "nowhere",
    "cli.main train --output run --corpus nowhere": "nowhere",
    "cli.main train --output /proc/run": "/proc/run",
    "cli.main train distill train --run run --teacher nowhere": "nowhere",
    "cli.main inspect nowhere": "'nowhere'",
    "cli.main inspect --device tpu": "'tpu'",
    "cli.main inspect --text nowhere": "nowhere",
}


class End(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
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


def test_the_docs_name_no_benchmark_that_is_not_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"python -m bench\.(\w+)", text))
    assert {"attack", "exactness"} <= named <= set(BENCHMARKS)
    assert len(BENCHMARKS) > 8


@pytest.mark.parametrize("command", HELP)
def test_help_needs_nothing_optional(ends, command):
    """bench.clients needed psutil, which only the tests bring."""
    assert ends[command].status == 0, ends[command].err
    assert ends[command].out.startswith(HELP[command])


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2(ends, command):
    end = ends[command]
    assert end.status == 2, end.err
    assert "Traceback" not in end.err
    *before, last = end.err.strip().splitlines()
    assert MISTAKES[command] in last, end.err
    assert not before or before[0].startswith("usage:"), end.err  # as argparse does
