"""A whole visit to a machine with a GPU, in one command: `python -m bench.gpu_visit --output FOLDER`.

Runs its steps in order of worth, each a command of its own with a limit of time, and writes what a step
says to the folder as it says it. A visit ends when its seconds are used up; the next one skips what is done,
tries what was never begun before what has failed or was cut off, and so goes on where the last one stopped.
Nothing is fetched: the model is made on the spot with random weights, and packages that the machine lacks lie
beside the sources as wheels (`scripts/gpu-wheels`). `--dry-run` takes the same way without a GPU, in tiny
sizes; its times say nothing. Exit status 0: all is done; 1: a step failed; 3: there is more to do.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from tqdm import tqdm

from bench.options import positive, reporting

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 30.0  # that a step is begun with, or its own limit if that is less
MORE_TO_DO = 3
Outcome = Literal["done", "failed", "cut off"]


class Step(NamedTuple):
    """A command: arguments of Python, what it shows, and seconds after which it is cut off."""

    name: str
    shows: str
    arguments: list[str]
    seconds: float


class Plan(NamedTuple):
    """The steps in order of worth, and `maker`, which makes the `model` that some of them name."""

    steps: list[Step]
    maker: Step
    model: Path

    def needs_model(self, step: Step) -> bool:
        """Whether the step's command names the model."""
        return str(self.model) in step.arguments


class Result(msgspec.Struct, frozen=True):
    """How a step ended; its output is in a file of the same name that ends in .log."""

    step: str
    outcome: Outcome
    seconds: float
    status: int | None
    shows: str
    command: list[str]


def plan_for(output: Path, model: Path) -> Plan:
    """A visit to a GPU."""
    maker = Step("model", "random weights in the sizes of Ouro-1.4B", _make(model), 240)
    return Plan(_steps(output, model), maker, model)


def _steps(output: Path, model: Path) -> list[Step]:
    where = ["--device", "cuda"]
    passes = ["-m", "bench.gpu_pass", *where]
    oracle = ["-m", "bench.oracle", "--model", str(model), "--backend", "cuda", "--dtype", "bfloat16"]
    oracle += ["--loops", "4", "--rounds", "2"]
    found = [
        Step(
            "kernels", "each kernel equals plain torch, rows alone too", _tests("test_cuda_kernels.py"), 300
        ),
        Step("backend", "texts, graphs and memory", _tests("test_cuda_backend.py", "test_gpu.py"), 300),
        _pass_step(output, "pass", "a pass over one reading of its weights, graphs on and off", passes, 240),
    ]
    for agreement in (0.9, 0.0):
        for at_once in (1, 16, 64, 4):
            name = f"oracle-{agreement}-{at_once}"
            asked = ["--agreement", str(agreement), "--requests", str(at_once)]
            asked += ["--num-prompts", str(max(at_once, 2)), "--output", str(output / f"{name}.json")]
            shows = f"speed over plain, AN ORACLE DRAFTS at {agreement}, {at_once} at once"
            found.append(Step(name, shows, [*oracle, *asked], 200))
    exact = ["-m", "bench.exactness", *where, "--dtype", "bfloat16", "--num-prompts", "250"]
    exact += ["--quantization", "none"]
    of_ouro = ["--model", str(model), *where, "--dtype", "bfloat16"]
    sizes = ["--rows", "1,4,64", "--context", "512", "--repeats", "12"]
    names = "default,wide,deep,flat,flat and wide,more slots,small blocks"
    tiles = [*passes, *sizes, "--tiles", names]
    throughput = ["-m", "cli.main", "bench", "throughput", *of_ouro, "--concurrency", "1,4,16,64"]
    latency = ["-m", "cli.main", "bench", "latency", *of_ouro, "--backend", "cuda", "--num-prompts", "4"]
    peer = ["-m", "bench.gpu_peer", *of_ouro, "--output", str(output / "peer.json")]
    return [
        *found,
        Step("exactness", "2,000 texts of the embedded model, on == off", exact, 540),
        _pass_step(output, "pass-int8", "the same with int8 weights", [*passes, "--int8"], 240),
        _pass_step(output, "tiles", "which tile is the fastest", tiles, 400),
        Step("latency", "one request at a time, random weights", latency, 300),
        Step("throughput", "1 to 64 requests, useless drafts", [*throughput, "--blocks", "2"], 400),
        Step("peer", "transformers' generate, loops unrolled", peer, 400),
    ]


def dry_plan_for(output: Path, model: Path) -> Plan:
    """The same without what needs a GPU, tests and CUDA graphs, and in tiny sizes."""
    passes = ["-m", "bench.gpu_pass", "--device", "cpu", "--shape", "tiny", "--dtype", "float32"]
    passes += ["--rows", "1,3", "--context", "20", "--repeats", "1", "--buffer", str(2**20)]
    oracle = [
        "-m",
        "bench.oracle",
        "--model",
        str(model),
        "--backend",
        "torch",
        "--loops",
        "4",
        "--rounds",
        "1",
    ]
    oracle += ["--num-prompts", "2", "--prompt-tokens", "4", "--max-tokens", "6"]
    peer = ["-m", "bench.gpu_peer", "--model", str(model), "--device", "cpu", "--dtype", "float32"]
    peer += ["--requests", "1,2", "--prompt-tokens", "4", "--max-tokens", "4", "--rounds", "1"]
    sizes = ["hidden_size=32", "intermediate_size=48", "num_attention_heads=4", "num_key_value_heads=4"]
    sizes += ["num_hidden_layers=2", "vocab_size=256", "max_position_embeddings=128"]
    made = [*_make(model), "--dtype", "float32", *(part for size in sizes for part in ("--set", size))]
    steps = [
        _pass_step(output, "pass", "a pass of plain operations", passes, 60),
        Step(
            "oracle-0.9-1", "AN ORACLE DRAFTS", [*oracle, "--output", str(output / "oracle-0.9-1.json")], 60
        ),
        Step("peer", "transformers' generate", [*peer, "--output", str(output / "peer.json")], 120),
    ]
    return Plan(steps, Step("model", "random weights in tiny sizes", made, 60), model)


def _pass_step(output: Path, name: str, shows: str, arguments: list[str], seconds: float) -> Step:
    return Step(name, shows, [*arguments, "--output", str(output / f"{name}.cases.json")], seconds)


def _tests(*files: str) -> list[str]:
    places = [f"tests/engine/{file}" for file in files]
    return ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations", "5", *places]


def _make(model: Path) -> list[str]:
    return ["-m", "bench.make_checkpoint", str(model)]


class Visit:
    """Steps, what became of them in earlier visits, and the seconds that this one has."""

    def __init__(self, plan: Plan, output: Path, before: Sequence[Path], seconds: float) -> None:
        """`before` are folders of earlier visits, beside `output` itself."""
        self.plan, self.output = plan, output
        self.results = {step.name: _latest(step.name, [*before, output]) for step in plan.steps}
        self._ends_at = time.monotonic() + seconds

    @property
    def order(self) -> list[Step]:
        """The steps to run: what was never begun first, then what failed or was cut off."""
        open_steps = [step for step in self.plan.steps if not self.is_done(step)]
        return sorted(open_steps, key=lambda step: self.results[step.name] is not None)

    def is_done(self, step: Step) -> bool:
        """Whether nothing is left to do of a step."""
        result = self.results[step.name]
        return result is not None and result.outcome == "done"

    def run(self, environment: dict[str, str]) -> None:
        """Runs steps until all are done or the seconds are used up. Raises ValueError without a model."""
        for step in tqdm(self.order, desc="visit", unit="step", disable=None):
            if self.plan.needs_model(step) and not (self.plan.model / "config.json").exists():
                made = self._run(self.plan.maker, environment)
                if made is None:
                    return
                if made.outcome != "done":
                    raise ValueError(f"the model can't be made: see {self.output / self.plan.maker.name}.log")
            result = self._run(step, environment)
            if result is None:
                return
            self.results[step.name] = result

    def _run(self, step: Step, environment: dict[str, str]) -> Result | None:
        """Runs a step and writes how it ended; None if too few seconds are left to begin it."""
        left = self._ends_at - time.monotonic()
        if left < min(step.seconds, LEAST_SECONDS):
            return None
        result = run_step(step, self.output, min(left, step.seconds), environment)
        written = msgspec.json.format(msgspec.json.encode(result))
        (self.output / f"{step.name}.result.json").write_bytes(written)
        print(f"{step.name}: {result.outcome} after {result.seconds:.1f} s ({step.shows})", flush=True)
        return result

    @property
    def status(self) -> int:
        """The exit status of the visit."""
        if any(result is not None and result.outcome == "failed" for result in self.results.values()):
            return 1
        return 0 if all(map(self.is_done, self.plan.steps)) else MORE_TO_DO


def run_step(step: Step, output: Path, seconds: float, environment: dict[str, str]) -> Result:
    """Runs a step's command, with all that it starts; both are ended when its seconds are over."""
    command = [sys.executable, *step.arguments]
    started = time.monotonic()
    with (output / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome: Outcome = "cut off" if status is None else "failed" if status else "done"
    took = time.monotonic() - started
    return Result(step.name, outcome, took, status, step.shows, ["python", *step.arguments])


def _latest(name: str, folders: Sequence[Path]) -> Result | None:
    """What became of a step: done if it ever was, else what the last folder says. ValueError if damaged."""
    found: Result | None = None
    for folder in folders:
        file = folder / f"{name}.result.json"
        if not file.is_file() or (found is not None and found.outcome == "done"):
            continue
        try:
            found = msgspec.json.decode(file.read_bytes(), type=Result)
        except msgspec.DecodeError as error:
            raise ValueError(f"{file} is no result of a step: {error}") from None
    return found


def environment_with(wheels: Path | None, site: Path) -> dict[str, str]:
    """The variables that steps run with; the `wheels` of a folder are unpacked to `site` first.

    Raises ValueError where that fails.
    """
    environment = {**os.environ, "SPEED_NATIVE": "0", "PYTHONUNBUFFERED": "1"}
    if wheels is None:
        return environment
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise ValueError(f"there is no wheel in --wheels {str(wheels)!r}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(site), *files], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"the wheels of {str(wheels)!r} can't be installed: {done.stderr.strip()}")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m bench.gpu_visit", description=__doc__)
    place = Path(os.environ.get("OUT", "gpu-visit"))
    made.add_argument("--output", type=Path, default=place, help="folder for results (default: $OUT)")
    made.add_argument("--before", type=Path, action="append", default=[], help="results of an earlier visit")
    made.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "gpu-visit", help="for the model"
    )
    made.add_argument("--wheels", type=Path, help="folder of packages that the machine lacks")
    made.add_argument("--seconds", type=positive, default=560, help="of this visit")
    made.add_argument("--dry-run", action="store_true", help="tiny sizes, without a GPU")
    made.add_argument("--list", action="store_true", help="print the steps and what became of them, run none")
    return made


@reporting("python -m bench.gpu_visit")
def main() -> int:
    """The command line."""
    args = parser().parse_args()
    for folder in args.before:
        if not folder.is_dir():
            raise ValueError(f"--before {str(folder)!r} is no folder")
    args.output.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    output, model = args.output.resolve(), args.work.resolve() / ("tiny" if args.dry_run else "ouro-1.4b")
    plan = (dry_plan_for if args.dry_run else plan_for)(output, model)
    visit = Visit(plan, output, args.before, args.seconds)
    if not args.list:
        visit.run(environment_with(args.wheels, args.work.resolve() / "site"))
    outcomes = {name: result.outcome if result else "to do" for name, result in visit.results.items()}
    print(json.dumps({"machine": "dry run" if args.dry_run else "gpu", "steps": outcomes}))
    return 0 if args.list else visit.status


if __name__ == "__main__":
    raise SystemExit(main())
