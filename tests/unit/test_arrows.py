"""The arrows of the design: which package may import which. Every import counts, lazy ones as well."""

import pytest

from scripts.arrows import ROOMS, ROOT, arrows, imports_of

# One line a package: all that it may import of this project.
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"bench", "training", "server", "model.study", "model.checkpoint"},
    "bench": {"training", "server", "model.worker", "model.engine", "model.passes", "model.checkpoint"}
    | {"model.schedule", "model.network", "model.options", "model.protocol", "model.machine"},
    "training": {"model.worker", "model.checkpoint", "model.network"},
    "server": {"model.worker", "model.checkpoint", "model.grammar", "model.rules", "model.options"}
    | {"model.protocol", "model.schedule"},
    "model": {"model.checkpoint"},
    "model.study": {"model.worker", "model.engine", "model.passes", "model.checkpoint", "model.schedule"}
    | {"model.network", "model.options", "model.protocol"},
    "model.worker": {"model.engine", "model.passes", "model.checkpoint", "model.grammar", "model.schedule"}
    | {"model.network", "model.options", "model.protocol", "model.machine"},
    "model.engine": {"model.passes", "model.grammar", "model.schedule", "model.network", "model.rules"}
    | {"model.options", "model.protocol"},
    "model.passes": {"model.schedule", "model.network", "model.options", "model.protocol", "model.machine"},
    "model.checkpoint": {"model.network", "model.machine"},
    "model.grammar": {"model.schedule", "model.protocol"},
    "model.schedule": {"model.options", "model.protocol"},
    "model.rules": {"model.options", "model.protocol"},
    "model.network": set(),
    "model.options": set(),
    "model.protocol": set(),
    "model.machine": set(),
}
FORBIDDEN = {
    "server": {"torch", "transformers", "triton"},
    "model": {"fastapi", "pydantic", "starlette", "uvicorn"},
    "model/schedule": {"torch"},
    "training": {"fastapi", "pydantic", "starlette", "uvicorn"},
}


def test_every_import_follows_an_arrow_of_the_design() -> None:
    against = {pair: found for pair, found in arrows().items() if pair[1] not in MAY_IMPORT[pair[0]]}
    assert not against


def test_the_arrows_of_the_design_make_no_circle_and_each_is_used() -> None:
    left = {package: set(targets) for package, targets in MAY_IMPORT.items()}
    while free := {package for package, targets in left.items() if not targets}:
        left = {package: targets - free for package, targets in left.items() if package not in free}
    assert not left
    assert {(here, there) for here, targets in MAY_IMPORT.items() for there in targets} == set(arrows())


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_package_imports_a_library_that_it_must_know_nothing_of(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(path)} & FORBIDDEN[folder], path


def test_every_folder_of_sources_is_looked_at() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == {*ROOMS, "tests"}
