"""docker/: what the files there name exists in the server. No container engine and no cluster is needed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cli.main import build_parser
from server.app import create_app
from server.command import read_settings
from server.settings import ENV_PREFIX, Settings
from tests.contract.test_metrics import served_and_refused
from tests.fake_engine import FakeEngine
from tests.text_tools import byte_codec

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DASHBOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+[\w.-]*")


def load(path: str) -> Any:
    return yaml.safe_load((DOCKER / path).read_text())


COMPOSE = load("compose.yaml")
SCRAPES = load("prometheus.yaml")["scrape_configs"]
DEPLOYMENT, SERVICE = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def image_port() -> int:
    return int(re.search(rf"{ENV_PREFIX}PORT=(\d+)", DOCKERFILE)[1])


def paths() -> set[str]:
    app = create_app(FakeEngine(lambda _: []), byte_codec(), Settings())
    return set(app.openapi()["paths"])


def seconds(text: str) -> float:
    return float(re.fullmatch(r"(\d+)s", text)[1])


async def exported_labels() -> dict[str, set[str]]:
    """Labels by the name of each sample, of a server that has served and refused."""
    async with served_and_refused() as served:
        text = (await served.client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.name)
async def test_every_metric_and_label_of_a_dashboard_is_exported(file):
    exported = await exported_labels()
    panels = json.loads(file.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for target in (target for panel in panels for target in panel["targets"]):
        names = re.findall(r"\b(?:speed:|process_)\w+", target["expr"])
        assert names, target["expr"]
        assert set(names) <= set(exported), target["expr"]
        grouped = re.findall(r"by \((\w+)\)", target["expr"])
        labels = {*grouped, *re.findall(r"{{(\w+)}}", target["legendFormat"])}
        assert labels <= set.intersection(*(exported[name] for name in names)), target["expr"]


def test_the_dashboard_is_where_grafana_looks_and_asks_the_prometheus_that_is_provisioned():
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    (provider,) = load("grafana/provisioning/dashboards/speed.yaml")["providers"]
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in {f"{provider['options']['path']}/{file.name}" for file in DASHBOARDS}
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for part in (panel, *panel["targets"]):
                assert part["datasource"] == {"type": source["type"], "uid": source["uid"]}
    host, port = re.fullmatch(r"http://([a-z]+):(\d+)", source["url"]).groups()
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")


def test_prometheus_scrapes_a_path_that_the_server_has_where_it_listens():
    (scrape,) = SCRAPES
    assert scrape["metrics_path"] in paths()
    assert scrape["static_configs"] == [{"targets": [f"speed:{image_port()}"]}]
    jobs = {job for file in DASHBOARDS for job in re.findall(r'job=\\"(\w+)\\"', file.read_text())}
    assert jobs <= {scrape["job_name"]}


def test_compose_mounts_what_is_there_and_leaves_requests_their_time():
    services = COMPOSE["services"]
    assert services["speed"]["ports"] == [f"127.0.0.1:{image_port()}:{image_port()}"]
    assert seconds(services["speed"]["stop_grace_period"]) > Settings().shutdown_timeout
    assert "profiles" not in services["speed"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["monitoring"]
        assert PINNED.fullmatch(services[name]["image"])
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    sources = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    for source in sources:
        assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_the_cluster_asks_paths_that_exist_at_the_port_that_is_served():
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    (port,) = CONTAINER["ports"]
    (outside,) = SERVICE["spec"]["ports"]
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert {probe["path"] for probe in probes.values()} | {annotations["prometheus.io/path"]} <= paths()
    assert {probe["port"] for probe in probes.values()} == {port["name"]} == {outside["targetPort"]}
    assert port["containerPort"] == image_port() == int(annotations["prometheus.io/port"])
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert PINNED.fullmatch(CONTAINER["image"])


def test_the_cluster_gives_options_that_exist_and_time_to_end():
    settings = read_settings(build_parser(CONTAINER["args"]).parse_args(CONTAINER["args"]))
    (_, before) = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] > settings.shutdown_timeout + float(before)
    limit = CONTAINER["resources"]["limits"]["memory"]
    assert settings.kv_cache_memory < int(limit.removesuffix("Gi")) * 2**30 / 2
    assert f"--uid {POD['securityContext']['runAsUser']} " in DOCKERFILE


def test_a_cluster_without_keys_has_no_open_server_and_a_service_changes_no_option():
    (keys,) = [variable for variable in CONTAINER["env"] if variable["name"] == "SPEED_API_KEYS"]
    assert "optional" not in keys["valueFrom"]["secretKeyRef"]
    assert POD["enableServiceLinks"] is False


def test_every_variable_is_that_of_an_option():
    named = {variable["name"] for variable in CONTAINER["env"]}
    named |= set(re.findall(rf"\b({ENV_PREFIX}[A-Z_]+)=", DOCKERFILE))
    assert len(named) >= 3
    assert {name.removeprefix(ENV_PREFIX).lower() for name in named} <= set(Settings.model_fields)
