"""matplotlib for pictures in files: imported when one is drawn, since it is an optional extra."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pyplot() -> ModuleType:
    """matplotlib.pyplot, set to write SVG without a screen."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("svg")
    from matplotlib import pyplot as found  # noqa: PLC0415

    module: ModuleType = found
    return module


def write_losses(figure: "Figure", axes: "Axes", path: Path, x_label: str) -> None:
    """Ends a plot of held-out losses over times: labels, a file that is the same every day, and no figure."""
    axes.set_xlabel(x_label)
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
