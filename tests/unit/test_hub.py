"""Models by folder and by hub id: the real huggingface_hub against a hub of this machine, and against none.

Each case runs in a process of its own, since the library reads its environment when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.checkpoint.hub import HubError, is_hub_id, model_folder
from tests.fake_hub import FakeHub, Repository

ROOT = Path(__file__).resolve().parents[2]
RESOLVE = """
import json, sys
from model.checkpoint.hub import HubError, model_folder
for arguments in json.loads(sys.argv[1]):
    try:
        print(json.dumps({"folder": str(model_folder(*arguments))}))
    except HubError as error:
        print(json.dumps({"error": str(error)}))
assert "torch" not in sys.modules
"""
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
# Every content is another one: the cache keeps equal files once.
FILES = {
    "config.json": b'{"of": "whole"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
    "README.md": b"words",
    "onnx/model.safetensors": b"of another runtime",
    "consolidated.safetensors": b"the same again",
}
SHARDED = {
    "config.json": b'{"of": "sharded"}',
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-1.safetensors": b"one",
    "model-2.safetensors": b"two",
    "model-3.safetensors": b"of no one",
}
REPOSITORIES = {
    "org/whole": Repository(FILES, revisions=("main", "v1.0")),
    "org/sharded": Repository(SHARDED),
    "org/private": Repository(FILES, token="hf_secret"),
    "org/gated": Repository(FILES, gated=True),
    "org/pickled": Repository({"config.json": b"{}", "pytorch_model.bin": b"a pickle"}),
    "org/dataset": Repository({"README.md": b"words"}),
    "org/broken": Repository({"config.json": b"{}", "model.safetensors.index.json": b"{"}),
    "org/astray": Repository(
        {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}
    ),
    "org/lacking": Repository({k: v for k, v in SHARDED.items() if k != "model-2.safetensors"}),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub(REPOSITORIES) as running:
        yield running


def resolve(home: Path, *calls: tuple[str, ...], **environment: str) -> list[dict[str, str]]:
    """Outcomes of `model_folder` calls in a fresh process with this HF_HOME."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(calls)],
        env={**inherited, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_what_the_loader_reads_is_downloaded_and_only_once(hub: FakeHub, tmp_path: Path) -> None:
    calls = (("org/whole",), ("org/whole", "v1.0"), ("org/sharded",))
    hub.asked.clear()
    outcomes = resolve(tmp_path, *calls, HF_ENDPOINT=hub.url)
    whole, tagged, sharded = (Path(outcome["folder"]) for outcome in outcomes)
    assert whole == tagged
    assert {p.name for p in whole.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert {p.name for p in sharded.iterdir()} == SHARDED.keys() - {"model-3.safetensors"}
    assert (sharded / "model-2.safetensors").read_bytes() == b"two"
    assert len(hub.asked) == len(set(hub.asked)) + 1  # config.json of two models
    assert tmp_path in whole.parents
    assert resolve(tmp_path, *calls, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == outcomes


def test_a_token_opens_a_private_model(hub: FakeHub, tmp_path: Path) -> None:
    (denied,) = resolve(tmp_path, ("org/private",), HF_ENDPOINT=hub.url)
    assert "HF_TOKEN" in denied["error"]
    (opened,) = resolve(tmp_path, ("org/private",), HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
    assert (Path(opened["folder"]) / "model.safetensors").read_bytes() == b"weights"


REFUSED = {
    ("org/nobody",): ("no folder 'org/nobody'", "no model of that name"),
    ("org/gated",): ("gated", "HF_TOKEN"),
    ("org/whole", "v9"): ("no revision 'v9'",),
    ("org/pickled",): ("no safetensors weights", "never loaded"),
    ("org/dataset",): ("no config.json",),
    ("org/broken",): ("index.json is not readable",),
    ("org/astray",): ("../x.safetensors",),
    ("org/lacking",): ("names model-2.safetensors",),
    ("org/a..b",): ("not a valid id",),
}


def test_every_refusal_is_one_line_that_says_why(hub: FakeHub, tmp_path: Path) -> None:
    outcomes = resolve(tmp_path, *REFUSED, HF_ENDPOINT=hub.url)
    for call, parts, outcome in zip(REFUSED, REFUSED.values(), outcomes, strict=True):
        assert "\n" not in outcome["error"]
        assert call[0] in outcome["error"]
        for part in parts:
            assert part in outcome["error"]


def test_nothing_of_a_pickled_model_is_downloaded_but_small_files(hub: FakeHub, tmp_path: Path) -> None:
    hub.asked.clear()
    resolve(tmp_path, ("org/pickled",), HF_ENDPOINT=hub.url)
    assert hub.asked == ["config.json"]


def test_without_a_network_the_cache_serves_and_an_absent_model_is_said_so(
    hub: FakeHub, tmp_path: Path
) -> None:
    closed = "http://127.0.0.1:9"  # nobody listens there
    resolve(tmp_path, ("org/whole",), HF_ENDPOINT=hub.url)
    cached, absent = resolve(tmp_path, ("org/whole",), ("org/sharded",), HF_ENDPOINT=closed)
    assert "folder" in cached
    assert "can't be reached (ConnectError)" in absent["error"]
    (offline,) = resolve(tmp_path, ("org/sharded",), HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in offline["error"]
    assert str(tmp_path) in offline["error"]


def test_an_interrupted_download_is_not_taken_for_a_model(hub: FakeHub, tmp_path: Path) -> None:
    """The small files are there, the weights never came."""
    resolve(tmp_path, ("org/whole",), HF_ENDPOINT=hub.url)
    next(tmp_path.rglob("snapshots/*/model.safetensors")).unlink()
    (outcome,) = resolve(tmp_path, ("org/whole",), HF_HUB_OFFLINE="1")
    assert "not all of it" in outcome["error"]


def test_a_folder_of_this_machine_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name")
    assert model_folder("org/name") == Path("org/name")


@pytest.mark.parametrize("model", ["nowhere", "/no/such/folder", "./org/name", "a/b/c", "~/x/y", ""])
def test_what_is_neither_folder_nor_id_is_said_so(model: str) -> None:
    assert not is_hub_id(model)
    with pytest.raises(HubError, match="no folder"):
        model_folder(model)


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="revision"):
        model_folder(str(tmp_path), "v1")
