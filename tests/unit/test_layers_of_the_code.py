"""Arrows of the design: which package may import which. Read from the sources, nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Modules of the engine from the bottom up; one may import itself and what stands before it.
ORDER = [
    {
        *("model.config", "model.protocol", "model.cache", "model.drafts", "model.cost", "model.hub"),
        "model.packed",
    },
    {"model.families", "model.layers", "model.wave", "model.checkpoint", "model.grammar", "model.ending"},
    {"model.sequence", "model.matching", "model.quantize"},
    {"model.reading"},
    {
        *("model.looped", "model.sampling", "model.scheduler", "model.compiling", "model.initial_state"),
        "model.compressed",
    },
    {"model.attention", "model.placement", "model.readout"},
    {"model.loader"},
    {"model.runner", "model.invariant"},
    {"model.engine"},
    {"model.worker", "model.measure"},
    {"model.serving", "model.quality"},
    {"model.training", "model.inspect"},
]
PURE = (
    *("model.wave", "model.scheduler", "model.cache", "model.sequence", "model.protocol", "model.config"),
    *("model.hub", "model.ending", "model.drafts", "model.cost", "model.reading"),
)
NUMPY = {"model.cache"}  # sums over all pages


def imports_of(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def level(module: str) -> int | None:
    prefixes = {".".join(module.split(".")[:2])}
    return next((i for i, names in enumerate(ORDER) if prefixes & names), None)


def test_the_server_never_imports_torch_and_the_engine_no_web_framework() -> None:
    for path in sources("server"):
        assert not {n for n in imports_of(path) if n.split(".")[0] in ("torch", "transformers")}, path
    for path in sources("model"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"fastapi", "pydantic", "starlette", "uvicorn", "server"}, path


def test_scheduler_wave_and_pages_are_pure_python() -> None:
    for module in PURE:
        roots = {n.split(".")[0] for n in imports_of(ROOT / (module.replace(".", "/") + ".py"))}
        assert not roots & ({"torch", "numpy"} - ({"numpy"} if module in NUMPY else set())), module


def test_every_arrow_between_engine_modules_points_down() -> None:
    for path in sources("model"):
        module = module_of(path)
        if module == "model":
            continue
        own = level(module)
        assert own is not None, f"{module} has no place in ORDER"
        for name in imports_of(path, top_level_only=True):
            target = level(name)
            if target is not None and ".".join(name.split(".")[:2]) != ".".join(module.split(".")[:2]):
                assert target < own, f"{module} imports {name}, which stands above or beside it"
