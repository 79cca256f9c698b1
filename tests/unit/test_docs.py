"""README and docs: their size, and that what they name is there."""

import argparse
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.main import build_parser
from scripts.arrows import arrows
from server.command import add_settings
from server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += [ROOT / "bench" / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPERATING = ROOT / "docs" / "operating.md"
# Of other programs, and those that every command has.
OTHERS = {"--help", "--version", "--print-completion", "--build-arg", "--build", "--profile", "--no"}
OTHERS |= {"--text", "--gguf", "--type"}  # of `speed inspect` and `speed export`
OTHERS |= {"--url", "--system", "--max-tokens"}  # of `speed chat` and `speed complete`
# Of containers.
OTHERS |= {"--cap-drop", "--cpus", "--from-literal", "--gpus", "--memory", "--read-only", "--rm"}
OTHERS |= {"--security-opt", "--user"}
# Of Ray.
OTHERS |= {"--address", "--disable-usage-stats", "--head", "--include-dashboard"}
SOURCES = ("bench", "cli", "model", "scripts", "server", "training")


def _anchors(page: Path) -> set[str]:
    """The names that a page's headings go by in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert 600 <= len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if not target.startswith("http"):
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in _anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_scripts_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ([a-z_.]+[a-z_])", text):
        assert find_spec(module) is not None, module
    for path in re.findall(r"\b(?:scripts|tests|docker|bench|training|model|server|cli)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path


def _commands(text: str) -> set[str]:
    """What follows `speed` in shell lines and in quoted commands, options and capitals left out."""
    found = re.findall(r"(?:(?:^    |`|&& )speed|-m cli\.main) ((?:[a-z]+ ?)+)", text, re.MULTILINE)
    return {words.strip() for words in found}


def _is_known(command: str) -> bool:
    """Whether the parser takes these words; asking for help ends before anything runs."""
    words = [*command.split(), "--help"]
    with pytest.raises(SystemExit) as end:
        build_parser(words).parse_args(words)
    return end.value.code == 0


def test_the_parser_knows_every_command_of_the_pages(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set().union(*(_commands(page.read_text()) for page in PAGES))
    assert {"serve", "bench latency", "train distill"} <= commands
    assert not [command for command in sorted(commands) if not _is_known(command)]
    assert not _is_known("bench nothing")
    capsys.readouterr()


def _settings() -> dict[str, str]:
    """The flag of every setting, by its environment variable."""
    parser = argparse.ArgumentParser(add_help=False)
    add_settings(parser)
    return {ENV_PREFIX + action.dest.upper(): action.option_strings[0] for action in parser._actions}


def test_every_option_is_described_once_with_its_variable() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `(SPEED_[A-Z_]+)` \|", OPERATING.read_text(), re.MULTILINE)
    assert len(rows) == len(Settings.model_fields)
    assert {variable: flag for flag, variable in rows} == _settings()


@pytest.mark.parametrize("name", ["operating.md", "api.md", "models.md"])
def test_every_option_that_is_mentioned_exists(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", text)) <= OTHERS.union(_settings().values())


def test_every_source_file_has_its_line_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Where things are")[1]
    named, folder = set(), ""
    for line in text.splitlines():
        if re.fullmatch(r"[\w/]+/", line):
            folder = line
        elif match := re.match(r" {4}(\w+\.py) ", line):
            named.add(folder + match[1])
    files = [path for package in SOURCES for path in (ROOT / package).rglob("*.py")]
    assert named == {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}


def test_the_graph_of_packages_is_the_one_that_the_script_prints() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    shown = text.split("```mermaid\n")[1].split("```")[0]
    assert shown.splitlines() == [
        "graph TD",
        *(f"    {here} --> {there}" for here, there in sorted(arrows())),
    ]
