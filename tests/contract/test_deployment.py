"""docker/: what the files there name exists in the server, and they are what their readers take.

No container engine and no cluster is needed: schemas of Kubernetes come from a package, and Compose checks
its files without Docker. The image is tested in tests/image, Prometheus in tests/e2e/test_prometheus.py.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cli.main import build_parser
from server.app import create_app
from server.command import read_settings
from server.settings import ENV_PREFIX, Settings
from tests.contract.test_metrics import served_and_refused
from tests.fake_engine import FakeEngine
from tests.loose import Json
from tests.text_tools import byte_codec

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DASHBOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+[\w.-]*")


def load(path: str) -> Json:
    return yaml.safe_load((DOCKER / path).read_text())


COMPOSE = load("compose.yaml")
SCRAPES = load("prometheus.yaml")["scrape_configs"]
MANIFESTS = [
    (file, manifest)
    for file in sorted((DOCKER / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]
KINDS = {manifest["kind"]: manifest for _, manifest in MANIFESTS}
DEPLOYMENT, SERVICE = KINDS["Deployment"], KINDS["Service"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def image_port() -> int:
    (port,) = re.findall(rf"{ENV_PREFIX}PORT=(\d+)", DOCKERFILE)
    return int(port)


def paths() -> set[str]:
    app = create_app(FakeEngine(lambda _: []), byte_codec(), Settings())
    return set(app.openapi()["paths"])


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found, text
    return float(found[1])


async def exported_labels() -> dict[str, set[str]]:
    """Labels by the name of each sample, of a server that has served and refused."""
    async with served_and_refused() as served:
        text = (await served.client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.name)
async def test_every_metric_and_label_of_a_dashboard_is_exported(file: Path) -> None:
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


def test_the_dashboard_is_where_grafana_looks_and_asks_the_prometheus_that_is_provisioned() -> None:
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
    address = re.fullmatch(r"http://([a-z]+):(\d+)", source["url"])
    assert address
    host, port = address.groups()
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")


def test_prometheus_scrapes_a_path_that_the_server_has_where_it_listens() -> None:
    (scrape,) = SCRAPES
    assert scrape["metrics_path"] in paths()
    assert scrape["static_configs"] == [{"targets": [f"speed:{image_port()}"]}]
    jobs = {job for file in DASHBOARDS for job in re.findall(r'job=\\"(\w+)\\"', file.read_text())}
    assert jobs <= {scrape["job_name"]}


def test_compose_mounts_what_is_there_and_leaves_requests_their_time() -> None:
    services = COMPOSE["services"]
    assert services["speed"]["ports"] == [f"127.0.0.1:{image_port()}:{image_port()}"]
    assert seconds(services["speed"]["stop_grace_period"]) > Settings().shutdown_timeout
    assert "profiles" not in services["speed"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["monitoring"]
        assert PINNED.fullmatch(services[name]["image"])
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    mounts = [volume.split(":") for service in services.values() for volume in service.get("volumes", ())]
    for source, *_ in mounts:
        assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_compose_gives_prometheus_its_rules_beside_its_configuration() -> None:
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["prometheus"]["volumes"])
    folder = Path(mounts["./prometheus.yaml"]).parent
    assert [str(folder / name) for name in load("prometheus.yaml")["rule_files"]] == [mounts["./alerts.yaml"]]


def test_compose_locks_the_server_up_and_reads_its_keys_from_a_file() -> None:
    speed = COMPOSE["services"]["speed"]
    assert speed["read_only"] is True
    assert speed["cap_drop"] == ["ALL"]
    assert speed["security_opt"] == ["no-new-privileges:true"]
    (secret,) = speed["secrets"]
    assert speed["environment"]["SPEED_API_KEY_FILE"] == f"/run/secrets/{secret}"
    assert "/api-keys" in (ROOT / ".gitignore").read_text().split()
    (volume,) = re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)
    assert speed["volumes"] == [f"cache:{volume}"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="Debian's docker-compose is not installed")
@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_takes_its_files(files: list[str]) -> None:
    """An empty SPEED_MODEL is none: the server warns of it as little as of one that isn't set."""
    options = [word for name in files for word in ("-f", str(DOCKER / name))]
    result = subprocess.run(
        ["docker-compose", *options, "--profile", "monitoring", "config"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
    )
    assert result.returncode == 0, result.stderr
    speed = yaml.safe_load(result.stdout)["services"]["speed"]
    assert speed["environment"]["SPEED_MODEL"] == ""
    assert speed["deploy"]["resources"]["limits"] == {"cpus": 2.0, "memory": "4G"}
    assert ("reservations" in speed["deploy"]["resources"]) == ("compose.gpu.yaml" in files)


def build_steps() -> list[str]:
    """Instructions of the Dockerfile's first stage."""
    whole_lines = re.sub(r"\\\n", "", DOCKERFILE)
    (_, stage, _) = re.split(r"^FROM .*$", whole_lines, flags=re.MULTILINE)
    return [line for line in stage.splitlines() if line and not line.startswith("#")]


def test_only_an_edit_of_the_dependencies_installs_them_again() -> None:
    """The steps that install them see pyproject.toml alone: all other edits take them from the cache."""
    steps = build_steps()
    copies = [number for number, step in enumerate(steps) if step.startswith("COPY")]
    installs = [number for number, step in enumerate(steps) if "install" in step and "requirements" in step]
    assert steps[copies[0]] == "COPY pyproject.toml ./"
    assert len(installs) == 2  # torch, and the rest
    assert copies[0] < min(installs) < max(installs) < copies[1]


def test_the_build_is_given_what_it_copies_and_nothing_else() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert sorted(kept) == sorted(" ".join(copied).split())
    assert all((ROOT / name).exists() for name in kept)


def test_the_cluster_asks_paths_that_exist_at_the_port_that_is_served() -> None:
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    (port,) = CONTAINER["ports"]
    (outside,) = SERVICE["spec"]["ports"]
    assert {probe["path"] for probe in probes.values()} <= paths()
    assert {probe["port"] for probe in probes.values()} == {port["name"]} == {outside["targetPort"]}
    assert port["containerPort"] == image_port()
    selectors = [SERVICE["spec"]["selector"], DEPLOYMENT["spec"]["selector"]["matchLabels"]]
    selectors += [KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]]
    selectors += [KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert len({tuple(selector.items()) for selector in selectors}) == 1
    assert PINNED.fullmatch(CONTAINER["image"])


def test_the_cluster_gives_options_that_exist_and_time_to_end() -> None:
    settings = read_settings(build_parser(CONTAINER["args"]).parse_args(CONTAINER["args"]))
    (_, before) = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] > settings.shutdown_timeout + float(before)
    limit = CONTAINER["resources"]["limits"]["memory"]
    assert settings.kv_cache_memory is not None
    assert settings.kv_cache_memory < int(limit.removesuffix("Gi")) * 2**30 / 2
    user, group = POD["securityContext"]["runAsUser"], POD["securityContext"]["runAsGroup"]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == [f"{user}:{group}"]
    (mount,) = CONTAINER["volumeMounts"]
    assert re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.MULTILINE) == [mount["mountPath"]]


def test_a_cluster_without_keys_has_no_open_server_and_a_service_changes_no_option() -> None:
    (keys,) = [variable for variable in CONTAINER["env"] if variable["name"] == "SPEED_API_KEYS"]
    assert "optional" not in keys["valueFrom"]["secretKeyRef"]
    assert POD["enableServiceLinks"] is False


def test_every_variable_is_that_of_an_option() -> None:
    named = {variable["name"] for variable in CONTAINER["env"]}
    named |= set(re.findall(rf"\b({ENV_PREFIX}[A-Z_]+)=", DOCKERFILE))
    assert len(named) >= 3
    assert {name.removeprefix(ENV_PREFIX).lower() for name in named} <= set(Settings.model_fields)


def test_the_cluster_s_pod_may_do_nothing_that_serving_does_not_need() -> None:
    """Kubernetes' pod security standard `restricted`, and a file system that can't be written."""
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    assert container == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


# Of other projects than Kubernetes: their definitions are in no package.
OTHERS_KINDS = {"ServiceMonitor"}


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("index", range(len(MANIFESTS)), ids=lambda index: MANIFESTS[index][1]["kind"])
def test_kubernetes_knows_every_field_of_the_manifests(index: int, version: str) -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="the extra `deploy` is not installed"
    ).validate
    _, manifest = MANIFESTS[index]
    if manifest["kind"] in OTHERS_KINDS:
        assert "k8s.io" not in manifest["apiVersion"]
        return
    validate(manifest, version, strict=True)
    with pytest.raises(Exception, match="unknownField"):  # the check can fail
        validate({**manifest, "unknownField": 1}, version, strict=True)


def test_the_service_is_what_the_operators_prometheus_scrapes() -> None:
    monitor = KINDS["ServiceMonitor"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= SERVICE["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == SERVICE["spec"]["ports"][0]["name"]
    assert endpoint["path"] in paths()
    assert SERVICE["metadata"]["labels"][monitor["spec"]["jobLabel"]] == SCRAPES[0]["job_name"]


async def gauges() -> dict[str, list[dict[str, str]]]:
    """Labels of each series of each gauge."""
    async with served_and_refused() as served:
        text = (await served.client.get("/metrics")).text
    families = [family for family in text_string_to_metric_families(text) if family.type == "gauge"]
    return {family.name: [sample.labels for sample in family.samples] for family in families}


async def test_replicas_are_added_by_a_gauge_that_a_server_has_once() -> None:
    scaler = KINDS["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert "replicas" not in DEPLOYMENT["spec"]  # that would set the number back whenever the file is applied
    (metric,) = scaler["metrics"]
    assert len((await gauges())[metric["pods"]["metric"]["name"]]) == 1


async def test_an_endpoint_picker_finds_our_gauges() -> None:
    config = yaml.safe_load(KINDS["ConfigMap"]["data"]["speed.yaml"])
    assert config["kind"] == "EndpointPickerConfig"
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in config["plugins"]}
    sources = config["dataLayer"]["sources"]
    references = [
        plugin["pluginRef"] for profile in config["schedulingProfiles"] for plugin in profile["plugins"]
    ]
    references += [source["pluginRef"] for source in sources]
    references += [extractor["pluginRef"] for source in sources for extractor in source["extractors"]]
    assert sorted(references) == sorted(plugins)
    assert plugins["metrics-data-source"]["path"] in paths()
    extractor = plugins["core-metrics-extractor"]
    (engine,) = extractor["engineConfigs"]
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert engine["name"] == extractor["defaultEngine"] == labels[extractor["engineLabelKey"]]
    found = await gauges()
    specs = {name: metric for name, metric in engine.items() if name.endswith("Spec")}
    assert set(specs) == {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "cacheInfoSpec"}
    assert {name: len(found[metric]) for name, metric in specs.items()} == dict.fromkeys(specs, 1)
    assert {"block_size", "num_gpu_blocks"} <= set(found[specs["cacheInfoSpec"]][0])
