"""The loss log of a run as a picture: cross-entropy after every loop against steps."""

from importlib.util import find_spec
from pathlib import Path

from training.pyplot import pyplot
from training.trainer import read_log

SMOOTHED = 0.9  # share of the running mean that each entry keeps


def plot_losses(folder: Path) -> None:
    """Writes loss.svg beside the run's log; without matplotlib or a log it does nothing."""
    entries = list(read_log(folder))
    if not entries or find_spec("matplotlib") is None:
        return
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for loop in range(max(len(entry["loss"]) for entry in entries)):
        points = [(entry["step"], entry["loss"][loop]) for entry in entries if loop < len(entry["loss"])]
        axes.plot(*zip(*points, strict=True), alpha=0.25, color=f"C{loop}")
        axes.plot(
            [step for step, _ in points],
            _smooth([loss for _, loss in points]),
            color=f"C{loop}",
            label=f"loop {loop + 1}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.legend()
    figure.savefig(folder / "loss.svg", metadata={"Date": None})
    plt.close(figure)


def _smooth(values: list[float]) -> list[float]:
    smooth, mean = [], values[0]
    for value in values:
        mean = SMOOTHED * mean + (1 - SMOOTHED) * value
        smooth.append(mean)
    return smooth
