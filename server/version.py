"""Which version of the package runs."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed version; a source tree that was not installed has none."""
    try:
        return version("speed-serve")
    except PackageNotFoundError:
        return "0+unknown"
