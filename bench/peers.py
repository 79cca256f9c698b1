"""`python -m bench.peers`: this project beside what a user would pick instead, in one run.

Ours, llama.cpp with SmolLM2-135M (twice the size and the teacher of our model) in Q4_1 and Q8_0, and
transformers' `generate` on our weights unrolled, each in a process of its own, job by job in turn. Three
jobs: one question at a time, several at once, and a long prompt of which the first token is waited for.
`scripts/peers` makes the environment of llama.cpp first. With `--gguf` llama.cpp runs the very model as well,
unrolled, if that is of Nanbeige's layout: `speed export MODEL --gguf FILE` makes the file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Self

from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import positive, reporting
from bench.peer_files import Q4, Q8
from bench.peer_jobs import Figures, Job
from bench.prompts import prompts_for, question_prompts
from bench.questions import QUESTIONS
from model.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "build" / "peers"
ALONE, TOGETHER, LONG = "one", "many", "long"


class Peer(NamedTuple):
    """Whom we run beside: a name and the command of its process."""

    name: str
    command: list[str]


class PeerProcess:
    """A peer that is ready for jobs; use as a context manager."""

    def __init__(self, peer: Peer) -> None:
        self.name = peer.name
        self._process = subprocess.Popen(
            peer.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, job: Job) -> Figures:
        """Raises ValueError if the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job._asdict()) + "\n")
        self._process.stdin.flush()
        return Figures(*json.loads(self._read()))

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the process of {self.name} ended; what it said stands above")
        return line


def peers_of(args: argparse.Namespace) -> list[Peer]:
    """Ours first. Raises ValueError where an environment is missing."""
    common = [str(args.threads), str(args.requests)]
    python = PEERS / "bin" / "python"
    for file in (python, PEERS / Q4, PEERS / Q8):
        if not file.exists():
            raise ValueError(f"{file.relative_to(ROOT)} is missing; scripts/peers makes it")
    llama = [str(python), "-m", "bench.peer_llama"]
    peers = [
        Peer("ours", [sys.executable, "-m", "bench.peer_ours", args.model, *common]),
        Peer("llama.cpp Q4_1", [*llama, str(PEERS / Q4), *common]),
        Peer("llama.cpp Q8_0", [*llama, str(PEERS / Q8), *common]),
        Peer(
            "transformers", [sys.executable, "-m", "bench.peer_transformers", args.model, str(args.threads)]
        ),
    ]
    if args.gguf is not None:
        peers.append(Peer("the same in llama.cpp", [*llama, str(args.gguf.resolve()), *common, "ids"]))
    return [peer for peer in peers if peer.name not in args.without]


def jobs_of(args: argparse.Namespace) -> list[dict[str, Job]]:
    """The three jobs of every round; no question comes twice before all have come."""
    questions = question_prompts(args.model)
    long = prompts_for(args.model, 0, args.rounds, args.prompt_tokens)
    rounds = []
    for number in range(args.rounds):
        several = [(number * args.requests + index) % len(questions) for index in range(args.requests)]
        rounds.append(
            {
                ALONE: Job([questions[several[0]]], [QUESTIONS[several[0]]], args.max_tokens),
                TOGETHER: Job(
                    [questions[i] for i in several], [QUESTIONS[i] for i in several], args.max_tokens
                ),
                LONG: Job([long[number]], [], 1),
            }
        )
    return rounds


def measure(peers: list[Peer], rounds: list[dict[str, Job]]) -> dict[str, dict[str, list[Figures]]]:
    """Figures by job and peer, one a round; a first round of its own warms up."""
    found: dict[str, dict[str, list[Figures]]] = {name: {p.name: [] for p in peers} for name in rounds[0]}
    running = [PeerProcess(peer).__enter__() for peer in peers]
    try:
        with tqdm(total=(len(rounds) + 1) * len(rounds[0]) * len(peers), desc="jobs", disable=None) as bar:
            for number, jobs in enumerate([rounds[0], *rounds]):
                for name, job in jobs.items():
                    for process in running if number % 2 else reversed(running):
                        bar.set_postfix_str(f"{name}: {process.name}")
                        figures = process.run(job)
                        if number:
                            found[name][process.name].append(figures)
                        bar.update()
                        time.sleep(0.2)  # its threads stop waiting by turning
    finally:
        for process in running:
            process.__exit__()
    return found


def report(found: dict[str, dict[str, list[Figures]]], args: argparse.Namespace) -> list[str]:
    """Lines of a table, medians over the rounds; ratios are medians of rounds too."""
    head = (
        "one request",
        "ours over it",
        f"{args.requests} at once",
        "ours over it",
        "first token",
        "memory",
    )
    lines = [f"{'':<22}" + "".join(f"{name:>15}" for name in head)]
    lines.append(f"{'':<22}" + "".join(f"{unit:>15}" for unit in ("tokens/s", "", "tokens/s", "", "s", "MB")))
    for peer in found[ALONE]:
        cells = []
        for name in (ALONE, TOGETHER):
            rates = [each.tokens / each.seconds for each in found[name][peer]]
            ours = [each.tokens / each.seconds for each in found[name]["ours"]]
            ratio = statistics.median(a / b for a, b in zip(ours, rates, strict=True))
            cells += [f"{statistics.median(rates):.1f}", f"{ratio:.2f}x"]
        cells.append(f"{statistics.median(each.first for each in found[LONG][peer]):.2f}")
        memory = max(each.memory for job in found.values() for each in job[peer])
        lines.append(f"{peer:<22}" + "".join(f"{cell:>15}" for cell in [*cells, f"{memory / 1e6:.0f}"]))
    return lines


@reporting("python -m bench.peers")
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="a chat model (default: embedded)")
    parser.add_argument("--gguf", type=Path, default=None, help="the model again, by `speed export`")
    parser.add_argument("--threads", type=positive, default=usable_cores())
    parser.add_argument("--requests", type=positive, default=8, help="at once")
    parser.add_argument("--max-tokens", type=positive, default=40)
    parser.add_argument("--prompt-tokens", type=positive, default=500, help="of the long prompt")
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leaves a peer out")
    args = parser.parse_args()
    found = measure(peers_of(args), jobs_of(args))
    print(f"{args.threads} threads each, {args.max_tokens} tokens a question, prompt of {args.prompt_tokens}")
    print("\n".join(report(found, args)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
