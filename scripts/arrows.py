"""Prints which package imports which, as text or (`--mermaid`) as a diagram; read from the sources.

Every import counts, those inside functions and those for the type checker alone as well. A package is a
folder of modules; a module that lies directly in `model/` counts as a package of its own, since the engine
and the messages are what the packages around them meet in.
"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cli", "bench", "training", "server", "model")


def imports_of(path: Path) -> Iterator[str]:
    """The dotted names of all modules that a source file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield node.module or ""
            if is_package(node.module or ""):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_package(name: str) -> bool:
    """Whether a dotted name is one of this project's packages, so that what is imported may be a module."""
    return name.split(".", maxsplit=1)[0] in ROOMS and ROOT.joinpath(*name.split(".")).is_dir()


def module_of(path: Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def package_of(module: str) -> str | None:
    """The package that a module belongs to; None for what is not this project's."""
    parts = module.split(".")
    if parts[0] not in ROOMS:
        return None
    if parts[0] != "model" or len(parts) == 1:
        return parts[0]
    return (
        ".".join(parts[:2])
        if ROOT.joinpath(*parts[:2]).with_suffix(".py").is_file() or is_package(".".join(parts[:2]))
        else "model"
    )


def arrows() -> dict[tuple[str, str], set[str]]:
    """The modules behind each arrow (importing package, imported package)."""
    found: dict[tuple[str, str], set[str]] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            module = module_of(path)
            here = package_of(module)
            assert here is not None
            for name in imports_of(path):
                there = package_of(name)
                if there not in (None, here, "model"):
                    found.setdefault((here, str(there)), set()).add(f"{module} -> {name}")
    return found


def main() -> None:
    """Prints the graph."""
    parser = argparse.ArgumentParser(description="Which package imports which.")
    parser.add_argument("--mermaid", action="store_true", help="a diagram for Markdown, not text")
    pairs = sorted(arrows())
    if parser.parse_args().mermaid:
        print("graph TD")
        for here, there in pairs:
            print(f"    {here} --> {there}")
        return
    packages = sorted({package for pair in pairs for package in pair})
    for here in packages:
        print(f"{here:<18}{' '.join(there for start, there in pairs if start == here)}")
    print(f"\n{len(packages)} packages, {len(pairs)} arrows")


if __name__ == "__main__":
    main()
