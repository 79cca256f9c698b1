"""matplotlib for pictures in files: imported when one is drawn, since it is an optional extra."""

from types import ModuleType


def pyplot() -> ModuleType:
    """matplotlib.pyplot, set to write SVG without a screen."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("svg")
    from matplotlib import pyplot as found  # noqa: PLC0415

    module: ModuleType = found
    return module
