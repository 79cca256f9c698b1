"""README and docs: their size, and that what they name is there."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
COMMANDS = {"serve", "inspect", "train", "bench"}


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert 600 <= len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ([a-z_.]+[a-z_])", text):
        assert find_spec(module) is not None, module
    for command in re.findall(r"(?:^|`|&& )(?:    )?speed ([a-z]+)", text, re.MULTILINE):
        assert command in COMMANDS, command
    for script in re.findall(r"\bscripts/[a-z_]+(?:\.py)?", text):
        assert (ROOT / script).is_file(), script


def test_every_option_is_described() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    documented = set(re.findall(r"^\| `--[a-z-]+` \| `SPEED_([A-Z_]+)` \|", text, re.MULTILINE))
    assert documented == {name.upper() for name in Settings.model_fields}
