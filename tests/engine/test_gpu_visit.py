"""`bench.gpu_visit`: the whole way without a GPU, and how a visit goes on where an earlier one stopped."""

import argparse
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from bench import gpu_pass, gpu_peer, latency, oracle, throughput
from bench.gpu_visit import ROOT, Plan, Step, Visit, dry_plan_for, environment_with, plan_for


def step(name: str, code: str, seconds: float = 20) -> Step:
    """A step that runs a line of Python."""
    return Step(name, "nothing", ["-c", code], seconds)


def plan_of(folder: Path, *steps: Step) -> Plan:
    """Steps that may name a model, which a line of Python makes."""
    model = folder / "model"
    made = f"import pathlib; p = pathlib.Path({str(model)!r}); p.mkdir(); (p / 'config.json').touch()"
    return Plan(list(steps), step("model", made), model)


def visit(folder: Path, plan: Plan, *before: Path, seconds: float = 60) -> Visit:
    """A visit that has run."""
    made = Visit(plan, folder, before, seconds)
    made.run(environment_with(None, folder))
    return made


def outcomes(made: Visit) -> dict[str, str | None]:
    """How each step ended."""
    return {name: result.outcome if result else None for name, result in made.results.items()}


def test_a_dry_run_takes_the_whole_way(tmp_path: Path) -> None:
    """Every command of it runs to its end, and a second call has nothing left to do."""
    command = [sys.executable, "-m", "bench.gpu_visit", "--dry-run", "--output", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert first.returncode == 0, first.stderr + "".join(f.read_text() for f in tmp_path.glob("out/*.log"))
    said = json.loads(first.stdout.splitlines()[-1])
    assert said == {"machine": "dry run", "steps": dict.fromkeys(("pass", "oracle-0.9-1", "peer"), "done")}
    cases = json.loads((tmp_path / "out" / "pass.cases.json").read_text())
    assert [case["rows"] for case in cases["cases"]] == [1, 3]
    assert all(case["over_reading"] > 0 for case in cases["cases"])
    oracle = json.loads((tmp_path / "out" / "oracle-0.9-1.json").read_text())
    assert oracle["agreement"] == 0.9
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.stdout.count("done after") == 0
    assert again.returncode == 0


def test_a_visit_skips_what_is_done_and_tries_what_failed_last(tmp_path: Path) -> None:
    first = visit(tmp_path, plan_of(tmp_path, step("a", "raise SystemExit(4)"), step("b", "print('b')")))
    assert outcomes(first) == {"a": "failed", "b": "done"}
    assert first.status == 1
    assert (tmp_path / "b.log").read_text() == "b\n"
    plan = plan_of(tmp_path, step("a", "print('mended')"), step("b", "raise SystemExit(1)"), step("c", ""))
    assert [each.name for each in Visit(plan, tmp_path, (), 60).order] == ["c", "a"]
    second = visit(tmp_path, plan)
    assert outcomes(second) == {"a": "done", "b": "done", "c": "done"}
    assert second.status == 0


def test_results_of_an_earlier_visit_in_another_folder_count(tmp_path: Path) -> None:
    """A machine may begin each visit with an empty folder."""
    early, late = tmp_path / "early", tmp_path / "late"
    early.mkdir()
    late.mkdir()
    visit(early, plan_of(early, step("a", "")))
    plan = plan_of(late, step("a", "raise SystemExit(1)"), step("b", ""))
    assert outcomes(visit(late, plan, early)) == {"a": "done", "b": "done"}
    assert not (late / "a.log").exists()


def test_a_step_is_cut_off_with_all_that_it_started(tmp_path: Path) -> None:
    """A shell's child would go on holding the device."""
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}], cwd={str(tmp_path)!r})"
    )
    made = visit(tmp_path, plan_of(tmp_path, step("slow", child, seconds=6)))
    assert outcomes(made) == {"slow": "cut off"}
    assert made.status == 3
    child_process = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/cmdline")
    until = time.monotonic() + 30
    while is_running(child_process) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(child_process)


def is_running(command_line: Path) -> bool:
    """Whether a process has a command line still: one that has ended has none, or is gone."""
    try:
        return bool(command_line.read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


CHILD = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(300)"


def test_no_step_begins_with_too_few_seconds_left(tmp_path: Path) -> None:
    made = visit(tmp_path, plan_of(tmp_path, step("long", "", seconds=100)), seconds=10)
    assert outcomes(made) == {"long": None}
    assert made.status == 3


def test_the_model_is_made_once_where_a_step_names_it(tmp_path: Path) -> None:
    """It isn't carried from visit to visit: a machine may begin bare."""
    model = tmp_path / "model"
    uses = Step(
        "uses", "nothing", ["-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).stat()", str(model)], 20
    )
    made = visit(tmp_path, plan_of(tmp_path, step("a", ""), uses, uses._replace(name="again")))
    assert set(outcomes(made).values()) == {"done"}
    assert (tmp_path / "model.result.json").exists()
    (tmp_path / "model.result.json").unlink()
    visit(tmp_path, plan_of(tmp_path, uses._replace(name="later")))
    assert not (tmp_path / "model.result.json").exists()


def test_a_model_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)._replace(maker=step("model", "raise SystemExit(1)"))
    uses = Step("uses", "nothing", ["-c", "", str(plan.model)], 20)
    with pytest.raises(ValueError, match="the model can't be made"):
        visit(tmp_path, plan._replace(steps=[uses]))


def test_damaged_results_and_folders_without_wheels_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.result.json").write_text("{")
    with pytest.raises(ValueError, match="is no result of a step"):
        Visit(plan_of(tmp_path, step("a", "")), tmp_path, (), 60)
    with pytest.raises(ValueError, match="there is no wheel in --wheels"):
        environment_with(tmp_path, tmp_path / "site")


def test_wheels_are_of_the_versions_that_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = re.findall(r"'([a-z-]+[<>=][^']+)'", (ROOT / "scripts" / "gpu-wheels").read_text())
    assert len(asked) >= 5
    assert set(asked) <= {*project["dependencies"], *project["optional-dependencies"]["test"]}


def test_every_command_of_a_visit_is_one_that_its_module_takes(tmp_path: Path) -> None:
    """A misspelt option would be found on the GPU, where minutes are few."""
    plans = (plan_for(tmp_path, tmp_path / "model"), dry_plan_for(tmp_path, tmp_path / "model"))
    parsers = {"bench.gpu_pass": gpu_pass.parser(), "bench.gpu_peer": gpu_peer.parser()}
    parsers["bench.oracle"] = oracle.parser()
    checked = set()
    for each in (one for plan in plans for one in (*plan.steps, plan.maker)):
        module, arguments = each.arguments[1], each.arguments[2:]
        if module in parsers:
            parsers[module].parse_args(arguments)
            checked.add(module)
        elif module == "cli.main":
            kind = {"latency": latency, "throughput": throughput}[arguments[1]]
            made = argparse.ArgumentParser()
            kind.add_arguments(made)
            made.parse_args(arguments[2:])
            checked.add(arguments[1])
        elif module == "pytest":
            assert all((ROOT / argument).is_file() for argument in arguments if argument.endswith(".py"))
            checked.add("pytest")
    assert checked == {*parsers, "latency", "throughput", "pytest"}
    assert all(each.seconds < 600 for plan in plans for each in plan.steps)
