"""Finds the packages that only a checkout has: `bench` and `training` aren't installed with the server."""

import sys
from importlib.util import find_spec
from pathlib import Path

from server.command import UsageError


def need(package: str) -> None:
    """Makes `package` importable, from the folder where the user stands if that is a checkout.

    It is searched last, so that nothing there hides an installed module. Raises UsageError.
    """
    if find_spec(package) is not None:
        return
    folder = Path.cwd()
    if not all((folder / name).is_file() for name in (f"{package}/__init__.py", "cli/checkout.py")):
        raise UsageError(
            f"this command needs the package {package!r}, which is not installed: run it from the root of a "
            f"checkout of this project (this folder is {str(folder)!r})"
        )
    sys.path.append(str(folder))
