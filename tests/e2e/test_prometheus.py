"""The real Prometheus, with the files of docker/, against a real server: what it scrapes, asks and warns of.

Needs Debian's package `prometheus`, which .ci/run installs.
"""

import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.conftest import ROOT, ServerProcess
from tests.loose import Json

DOCKER = ROOT / "docker"
CONFIG, ALERTS = DOCKER / "prometheus.yaml", DOCKER / "alerts.yaml"
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "speed.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
LOAD_SECONDS = 4

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Debian's package prometheus is not installed",
)


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.at = ""  # when expressions are asked for: the present, or a Unix time

    def ask(self, path: str, **parameters: str) -> Json:
        """The data of an answer of its API."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression is, a value for each series; 0 / 0 is none."""
        result = self.ask("query", query=expression, **({"time": self.at} if self.at else {}))["result"]
        values = [float(series["value"][1]) for series in result]
        return [value for value in values if not math.isnan(value)]

    def targets(self) -> list[dict[str, Json]]:
        return list(self.ask("targets")["activeTargets"])


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """The configuration of docker/, but for the target's address and a scrape each half second."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] |= {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(ALERTS, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--web.listen-address={address}"]
    process = subprocess.Popen(
        [*command, f"--storage.tsdb.path={folder / 'data'}"], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: is_ready(f"http://{address}"))
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.communicate(timeout=30)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def load(server: ServerProcess) -> None:
    """Answers, a refusal and an unknown path, for a few scrapes."""
    prompt = (
        "The water of the river runs down to the sea, and the wind that comes from there brings rain. " * 2
    )
    body = {"model": "default", "prompt": prompt, "max_tokens": 32, "temperature": 0}
    deadline = time.monotonic() + LOAD_SECONDS
    while time.monotonic() < deadline:
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert httpx.post(f"{server.url}/v1/completions", json=body | {"prompt": 1.5}).status_code == 400
        assert httpx.get(f"{server.url}/none").status_code == 404


@pytest.fixture(scope="module")
def watched(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus after a short load on a server that speculates."""
    options = ["--model", str(checkpoint), "--row-budget", "32", "--draft-policy", "recheck"]
    folder = tmp_path_factory.mktemp("prometheus")
    with ServerProcess(*options) as server, prometheus(folder, f"127.0.0.1:{server.port}") as running:
        wait_until(lambda: [target["health"] for target in running.targets()] == ["up"])
        load(server)
        time.sleep(1)
        running.at = str(time.time())  # a slow machine asks the last one long after the load
        yield running


def test_the_server_is_scraped_without_a_fault(watched: Prometheus) -> None:
    (target,) = watched.targets()
    assert (target["health"], target["lastError"]) == ("up", "")
    assert target["labels"]["job"] == "speed"


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_of_the_dashboard_has_data_after_a_short_load(
    watched: Prometheus, expression: str
) -> None:
    assert watched.values(expression.replace("$__rate_interval", "60s"))


def test_what_prometheus_stores_is_what_was_asked_for(watched: Prometheus) -> None:
    """Series that are there from the first scrape on: increase() sees every event."""
    for status in ("200", "400"):
        (count,) = watched.values(f'speed:http_requests_total{{handler="/v1/completions",status="{status}"}}')
        (seen,) = watched.values(
            f'increase(speed:http_requests_total{{handler="/v1/completions",status="{status}"}}[60s])'
        )
        assert count > 0
        assert seen > 0.8 * count
    assert watched.values("speed:speculation_enabled") == [1]
    (memory,) = watched.values("speed:engine_resident_memory_bytes")
    assert 50e6 < memory < 2e9
    (agreeing,) = watched.values("sum(speed:spec_decode_agreeing_readouts_total)")
    (compared,) = watched.values("sum(speed:spec_decode_compared_readouts_total)")
    assert 0 < agreeing <= compared


def test_the_alerts_are_evaluated_and_none_fires_on_a_server_that_works(watched: Prometheus) -> None:
    (group,) = watched.ask("rules")["groups"]
    wait_until(lambda: all(rule["health"] == "ok" for rule in watched.ask("rules")["groups"][0]["rules"]))
    assert [rule["name"] for rule in group["rules"]] == list(RAISED)
    assert not watched.ask("alerts")["alerts"]


# What lets each alert fire: series, as promtool writes them, and after how long.
LABELS = 'instance="a:8000", job="speed"'
COMPLETIONS = f'speed:http_requests_total{{{LABELS}, handler="/v1/completions", status='
RAISED = {
    "SpeedDown": ({f"up{{{LABELS}}}": "0x60"}, "2m"),
    "SpeedEngineRestarted": ({f"speed:engine_restarts_total{{{LABELS}}}": "0 0 1x60"}, "3m"),
    "SpeedServerErrors": ({f'{COMPLETIONS}"200"}}': "0+60x60", f'{COMPLETIONS}"503"}}': "0+2x60"}, "15m"),
    "SpeedSequencesFail": (
        {f'speed:request_success_total{{{LABELS}, finished_reason="error"}}': "0 0 1x60"},
        "3m",
    ),
    "SpeedRefusesRequests": (
        {f'speed:admission_rejections_total{{{LABELS}, reason="tokens"}}': "0+1x60"},
        "15m",
    ),
    "SpeedFirstTokenSlow": (
        {
            f'speed:time_to_first_token_seconds_bucket{{{LABELS}, le="10"}}': "0+1x60",
            f'speed:time_to_first_token_seconds_bucket{{{LABELS}, le="20"}}': "0+2x60",
            f'speed:time_to_first_token_seconds_bucket{{{LABELS}, le="+Inf"}}': "0+2x60",
        },
        "15m",
    ),
    "SpeedCacheFull": ({f"speed:num_preemptions_total{{{LABELS}}}": "0+1x60"}, "20m"),
    "SpeedSpeculationOff": ({f"speed:speculation_enabled{{{LABELS}}}": "0x60"}, "40m"),
}
# The same series of a server that works.
QUIET = {
    f"up{{{LABELS}}}": "1x60",
    f"speed:engine_restarts_total{{{LABELS}}}": "1x60",
    f'{COMPLETIONS}"200"}}': "0+60x60",
    f'{COMPLETIONS}"503"}}': "3x60",
    f'{COMPLETIONS}"429"}}': "0+60x60",
    f'speed:request_success_total{{{LABELS}, finished_reason="error"}}': "1x60",
    f'speed:admission_rejections_total{{{LABELS}, reason="tokens"}}': "5x60",
    f'speed:admission_rejections_total{{{LABELS}, reason="engine_loading"}}': "0+1x60",
    f'speed:time_to_first_token_seconds_bucket{{{LABELS}, le="5"}}': "0+2x60",
    f'speed:time_to_first_token_seconds_bucket{{{LABELS}, le="+Inf"}}': "0+2x60",
    f"speed:num_preemptions_total{{{LABELS}}}": "7x60",
    f"speed:speculation_enabled{{{LABELS}}}": "1x60",
}


def check_rules(folder: Path, series: dict[str, str], at: str, firing: list[str]) -> str:
    """promtool's opinion: which of all alerts fire at that time. Empty if it is exactly `firing`."""
    shutil.copy(ALERTS, folder)
    names = [rule["alert"] for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]]
    given = [{"series": name, "values": values} for name, values in series.items()]
    counts = [
        {"expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}})', "eval_time": at}
        | {"exp_samples": [{"labels": "{}", "value": 1}] if name in firing else []}
        for name in names
    ]
    test = {"interval": "1m", "input_series": given, "promql_expr_test": counts}
    (folder / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": [test]})
    )
    result = subprocess.run(
        ["promtool", "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True, check=False
    )
    return "" if result.returncode == 0 else result.stdout + result.stderr


@pytest.mark.parametrize("name", RAISED)
def test_each_alert_fires_and_no_other_with_it(name: str, tmp_path: Path) -> None:
    series, at = RAISED[name]
    assert not check_rules(tmp_path, series, at, [name])


@pytest.mark.parametrize("at", ["5m", "15m", "50m"])
def test_no_alert_fires_on_a_server_that_works(at: str, tmp_path: Path) -> None:
    assert not check_rules(tmp_path, QUIET, at, [])
    assert check_rules(tmp_path, QUIET, at, ["SpeedDown"])  # what is checked here can fail


def test_promtool_accepts_the_configuration_with_its_rules() -> None:
    result = subprocess.run(
        ["promtool", "check", "config", str(CONFIG)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (rules,) = re.findall(r"(\d+) rules found", result.stdout)
    assert int(rules) == len(RAISED)
