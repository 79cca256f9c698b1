"""Tables and plot of `bench.encoder_decoder`. Knows nothing about how the figures were measured."""

import json
from pathlib import Path
from typing import NamedTuple

from bench.encoder_decoder_variants import Decoder
from training.pyplot import pyplot, write_losses
from training.recipe import Recipe

NAME = "encoder_decoder"
PLAIN, SPEED = "none", "recheck"  # draft policies
MODES = {PLAIN: "plain", SPEED: "SPEED"}
# Tokens of a docstring as its author wrote it.
BUCKETS = {"below 16": range(16), "16 to 64": range(16, 65), "above 64": range(65, 1000)}
PAPER = {"2 x 6": "13 to 17 %", "4 x 3": "6 to 14 %"}


class Figures(NamedTuple):
    """Sums over the texts of one bucket; `seconds` has everything, the encoder too."""

    texts: int
    tokens: int  # written, end tokens too
    seconds: float
    passes: int
    guesses: int  # of the first loop
    corrected: int  # of them, by the last loop
    rouge_l: float
    equal_to_plain: int


class Row(NamedTuple):
    """One model in one mode of decoding."""

    decoder: Decoder
    policy: str
    parameters: int
    loss: list[float]  # held-out, nats a token, per loop
    buckets: dict[str, Figures]

    @property
    def all(self) -> Figures:
        """Of all buckets together."""
        return Figures._make(map(sum, zip(*self.buckets.values(), strict=True)))


def write_report(rows: list[Row], recipe: Recipe, folder: Path) -> None:
    """Writes encoder_decoder.md, .svg and .json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = [
        {
            **row._asdict(),
            "decoder": row.decoder.name,
            "buckets": {name: figures._asdict() for name, figures in row.buckets.items()},
        }
        for row in rows
    ]
    (folder / f"{NAME}.json").write_text(json.dumps(raw, indent=1) + "\n")
    page = report(rows, recipe)
    (folder / f"{NAME}.md").write_text(page)
    print(page)
    plot(rows, folder / f"{NAME}.svg")


def report(rows: list[Row], recipe: Recipe) -> str:
    """The page: all models, the same by length of the docstring, and how often later loops correct."""
    tokens, model = recipe.total_steps * recipe.tokens_per_step / 1e6, recipe.model
    layers = model.encoder.num_layers if model.encoder else 0
    sizes = ", ".join(f"{name}: {figures.texts}" for name, figures in rows[0].buckets.items())
    paper = " and ".join(f"{rate} for {name}" for name, rate in PAPER.items())
    columns = " | ".join(f"ms/token, {name} | passes | written | ROUGE-L" for name in BUCKETS)
    models = "\n".join(_model_line(row) for row in rows)
    by_length = "\n".join(_length_line(row) for row in rows)
    corrections = "\n".join(_correction_line(row) for row in rows if row.policy == SPEED)
    return f"""# Shared and unshared decoders

`python -m bench.encoder_decoder` (recipe: bench/encoder_decoder.toml): docstrings of Python functions from
their code; an encoder of {layers} layers, width {model.hidden_size}; {tokens:.1f} million training tokens for
every model, sources and padding among them. Greedy, one text at a time, fp32 by torch, all models in turn in
one process; a text's time is the median of its rounds, the encoder's included. `2 x 6` is two stored layers
run six times.

| decoder | decoding | parameters | held-out loss | ROUGE-L | ms/token | passes/token | texts = plain |
|---|---|---|---|---|---|---|---|
{models}

Held-out loss is in nats a token. `SPEED`: drafts of every loop before the last (policy `recheck`).

## By length

By the tokens of the docstring as it stands in the file ({sizes}). `written`: tokens that the model wrote, on
average; `passes`: for each of them.

| decoder | decoding | {columns} |
|---|---|{"---|" * 4 * len(BUCKETS)}
{by_length}

## How often the last loop corrects the first one's token

While decoding with SPEED. The paper reports {paper}.

| decoder | all | {" | ".join(BUCKETS)} | held-out loss after each loop |
|---|---|{"---|" * len(BUCKETS)}---|
{corrections}
"""


def _model_line(row: Row) -> str:
    figures = row.all
    return (
        f"| {row.decoder.name} | {MODES[row.policy]} | {row.parameters / 1e6:.2f} M | {row.loss[-1]:.4f} | "
        f"{figures.rouge_l / figures.texts:.3f} | {_milliseconds(figures):.2f} | "
        f"{figures.passes / figures.tokens:.3f} | {figures.equal_to_plain / figures.texts:.0%} |"
    )


def _length_line(row: Row) -> str:
    cells = [_cells(figures) for figures in row.buckets.values()]
    return f"| {row.decoder.name} | {MODES[row.policy]} | {' | '.join(cells)} |"


def _cells(figures: Figures) -> str:
    written, passes = figures.tokens / figures.texts, figures.passes / figures.tokens
    return (
        f"{_milliseconds(figures):.2f} | {passes:.2f} | {written:.0f} | {figures.rouge_l / figures.texts:.3f}"
    )


def _correction_line(row: Row) -> str:
    shares = [f"{f.corrected / max(1, f.guesses):.1%}" for f in (row.all, *row.buckets.values())]
    losses = ", ".join(f"{loss:.3f}" for loss in row.loss)
    return f"| {row.decoder.name} | {' | '.join(shares)} | {losses} |"


def _milliseconds(figures: Figures) -> float:
    return 1e3 * figures.seconds / figures.tokens


def plot(rows: list[Row], path: Path) -> None:
    """Held-out loss against time per token; an arrow leads from plain decoding to SPEED."""
    plt = pyplot()

    plt.rcParams["svg.hashsalt"] = NAME  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    points = {(row.decoder, row.policy): (_milliseconds(row.all), row.loss[-1]) for row in rows}
    shared = {decoder for decoder, policy in points if policy == SPEED}
    kinds = {
        "layers of their own": [p for (d, _), p in points.items() if d not in shared],
        "shared layers, plain": [p for (d, policy), p in points.items() if d in shared and policy == PLAIN],
        "shared layers, SPEED": [p for (_, policy), p in points.items() if policy == SPEED],
    }
    for (label, places), marker in zip(kinds.items(), "os^", strict=True):
        axes.scatter(*zip(*places, strict=True), marker=marker, label=label)
    for (decoder, policy), place in points.items():
        axes.annotate(decoder.name, place, (5, 5), textcoords="offset points", fontsize=8)
        if policy == SPEED:
            arrow = {"arrowstyle": "->", "color": "grey", "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", place, points[decoder, PLAIN], arrowprops=arrow)
    write_losses(figure, axes, path, "milliseconds per token, one text at a time")
