"""Which models a command line means, under which names, and how many of them share the memory."""

from pathlib import Path

import pytest

from cli.main import UsageError, build_parser, main
from server.command import is_named, read_settings, served_models
from server.serve import worker_options
from server.settings import Settings


def models_of(*argv: str) -> tuple[list[Settings], bool]:
    command = ["serve", *argv]
    args = build_parser(command).parse_args(command)
    settings = read_settings(args)
    return served_models(settings, args.checkpoint), is_named(settings, args.checkpoint)


def names_of(*argv: str) -> list[list[str]]:
    return [model.model_names for model in models_of(*argv)[0]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models, something else, and a model below one: only what lies directly in it counts."""
    for name in ("raven", "ouro", "dory", "ouro/inner"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_model_has_the_name_of_its_folder_or_the_ones_it_is_given(folder: Path) -> None:
    assert names_of("raven", str(folder / "ouro")) == [["raven"], ["ouro"]]
    assert names_of("big,large=raven", "ouro") == [["big", "large"], ["ouro"]]
    assert names_of("raven") == [["raven"]]
    assert names_of("x=raven") == [["x"]]
    assert names_of("raven", "--served-model-name", "a,b") == [["a", "b"]]
    (folder / "a=b").mkdir()
    (folder / "a=b" / "config.json").write_text("{}")
    assert names_of("a=b") == [["a=b"]]


def test_a_folder_of_models_serves_all_of_them_and_loads_none_at_the_start(folder: Path) -> None:
    assert names_of("--model-dir", ".") == [["dory"], ["ouro"], ["raven"]]
    assert models_of("--model-dir", ".")[1] is False
    assert models_of("raven", "ouro")[1] is True
    assert models_of("raven")[1] is True
    # Named ones come first, and once.
    assert names_of("raven", "--model-dir", str(folder)) == [["raven"], ["dory"], ["ouro"]]
    assert models_of("raven", "--model-dir", ".")[1] is True


def test_a_model_of_the_environment_is_a_named_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEED_MODEL", "raven")
    assert names_of("--model-dir", ".") == [["raven"], ["dory"], ["ouro"]]
    assert names_of("ouro") == [["ouro"]]
    assert folder.is_dir()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "sharers"),
    [
        (["raven"], 1),
        (["raven", "--max-loaded", "5"], 1),
        (["raven", "ouro"], 2),
        (["raven", "ouro", "--max-loaded", "1"], 1),
        (["raven", "ouro", "--max-loaded", "7"], 2),
        (["--model-dir", "."], 1),
        (["--model-dir", ".", "--max-loaded", "2"], 2),
        (["raven", "--model-dir", "."], 1),
    ],
)
def test_memory_is_shared_by_as_many_as_may_be_loaded(argv: list[str], sharers: int) -> None:
    models, _ = models_of(*argv)
    assert {model.max_loaded for model in models} == {sharers}
    assert {worker_options(model).cache_sharers for model in models} == {sharers}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["raven", "raven"], ["raven", "both named"]),
        (["raven", "raven=ouro"], ["raven", "ouro", "NAME=MODEL"]),
        (["dory=raven", "--model-dir", "."], ["raven", "dory", "both named"]),
        (["raven", "notes"], ["notes", "config.json"]),
        (["raven", "nowhere"], ["nowhere"]),
        (["=raven"], ["=raven", "empty name"]),
        (["a,,b=raven"], ["a,,b=raven", "empty name"]),
        (["x=nowhere"], ["nowhere"]),
        (["x=raven", "--served-model-name", "y"], ["x=raven", "--served-model-name"]),
        (["raven", "ouro", "--served-model-name", "y"], ["--served-model-name", "2"]),
        (["raven", "ouro", "--revision", "main"], ["--revision", "2"]),
        (["--model-dir", ".", "--served-model-name", "y"], ["--served-model-name", "0"]),
        (["raven", "ouro", "--model", "dory"], ["given twice", "raven", "dory"]),
        (["--model-dir", "nowhere"], ["--model-dir", "nowhere"]),
        (["--model-dir", "notes"], ["--model-dir", "notes", "config.json"]),
        (["--max-loaded", "0"], ["--max-loaded", "0"]),
        (["--unload-idle", "0"], ["--unload-idle", "0"]),
        (["--unload-idle", "-1"], ["--unload-idle", "-1"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], parts: list[str]
) -> None:
    assert main(["serve", "--port", "0", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error


def test_a_name_that_clashes_is_known_before_anything_is_served(folder: Path) -> None:
    with pytest.raises(UsageError, match="both named 'raven'"):
        models_of("raven", f"raven={folder / 'dory'}")
