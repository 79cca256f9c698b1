"""What `pip install .` brings: the command, the default model, and nothing oversized."""

from importlib import metadata

import pytest

from tests.e2e.conftest import ROOT


@pytest.fixture
def distribution() -> metadata.Distribution:
    try:
        found = metadata.distribution("speed-serve")
    except metadata.PackageNotFoundError:
        pytest.skip("speed-serve is not installed here")
    if '"editable": true' in (found.read_text("direct_url.json") or ""):
        pytest.skip("an editable install lists no files")
    return found


def test_the_wheel_holds_what_a_server_needs_and_nothing_else(
    distribution: metadata.Distribution,
) -> None:
    files = {str(path): path for path in distribution.files or []}
    embedded = {file.name for file in (ROOT / "model" / "weights" / "default").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= embedded
    for name in embedded:
        assert f"model/weights/default/{name}" in files
    assert {name.split("/")[0] for name in files} & {"bench", "training", "tests", "scripts"} == set()
    for name in ("index.html", "app.js", "style.css"):
        assert f"server/playground/{name}" in files
    assert [entry.value for entry in distribution.entry_points if entry.name == "speed"] == ["cli.main:main"]
    assert sum(path.size or 0 for path in files.values()) < 80e6
