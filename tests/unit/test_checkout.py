"""Commands that only a checkout has are found there, and said to be missing elsewhere."""

import sys
from pathlib import Path

import pytest

from cli import checkout
from server.command import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "path", ["/installed"])


@pytest.mark.usefixtures("not_installed")
def test_the_root_of_a_checkout_is_searched_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checkout.need("bench")
    assert sys.path == ["/installed", str(ROOT)]


@pytest.mark.usefixtures("not_installed")
def test_elsewhere_the_command_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"'bench', which is not installed: .* checkout"):
        checkout.need("bench")
    assert sys.path == ["/installed"]
