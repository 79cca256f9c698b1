"""Table and plot of `bench.depth_for_free`. Knows nothing about how the figures were measured."""

import json
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from bench.depth_variants import Variant
from training.pyplot import pyplot, write_losses
from training.recipe import Recipe

NAME = "depth_for_free"
PLAIN, SPEED, SERVER = "none", "recheck", "adaptive"  # draft policies
MODES = {PLAIN: "plain", SPEED: "SPEED", SERVER: "n-grams"}
PAPER = (
    "SPEED (Hooper et al. 2023) reports 6 to 14 % of first predictions changed by later iterations for a "
    "decoder of 4 layers x 3 and 13 to 17 % for 2 x 6, on translation."
)


class Row(NamedTuple):
    """One model in one mode of decoding."""

    variant: Variant
    policy: str
    parameters: int
    loss: list[float]  # held-out, nats a token, per loop
    agreement: list[float]  # held-out share of greedy tokens equal to the last loop's, per loop
    milliseconds_per_token: float
    passes_per_token: float
    equal_texts: float


class Claim(NamedTuple):
    """What depth by looping costs and gains, R against 1 and against as many layers of their own."""

    variant: Variant
    plain: float  # time per token, both plain
    speed: float  # with drafts of early loops, over plain R = 1
    server: float  # with n-grams looked up as well, over plain R = 1
    server_both: float  # the same over R = 1 with n-grams looked up
    share_of_gain: float | None  # of the way from the block alone to unshared layers of the same depth


def claims(rows: list[Row]) -> list[Claim]:
    """One for every looped model whose block was measured alone too.

    `share_of_gain` is None where the unshared one wasn't measured.
    """
    by_mode = {(row.variant, row.policy): row for row in rows}
    looped = [row.variant for row in rows if row.policy == SPEED]
    return [_claim(variant, by_mode) for variant in looped if (Variant(variant.layers, 1), PLAIN) in by_mode]


def _claim(variant: Variant, by_mode: dict[tuple[Variant, str], Row]) -> Claim:
    def time(of: Variant, policy: str) -> float:
        return by_mode[of, policy].milliseconds_per_token

    def loss(of: Variant) -> float:
        return by_mode[of, PLAIN].loss[-1]

    base, deep = Variant(variant.layers, 1), Variant(variant.layers * variant.loops, 1)
    return Claim(
        variant,
        plain=time(variant, PLAIN) / time(base, PLAIN),
        speed=time(variant, SPEED) / time(base, PLAIN),
        server=time(variant, SERVER) / time(base, PLAIN),
        server_both=time(variant, SERVER) / time(base, SERVER),
        share_of_gain=(loss(base) - loss(variant)) / (loss(base) - loss(deep))
        if (deep, PLAIN) in by_mode
        else None,
    )


def write_report(rows: list[Row], recipe: Recipe, temperature: float, folder: Path) -> None:
    """Writes depth_for_free.md, .svg and .json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = [{**row._asdict(), "variant": row.variant.name} for row in rows]
    (folder / f"{NAME}.json").write_text(json.dumps(raw, indent=1) + "\n")
    page = report(rows, recipe, temperature)
    (folder / f"{NAME}.md").write_text(page)
    print(page)
    plot(rows, folder / f"{NAME}.svg")


def report(rows: list[Row], recipe: Recipe, temperature: float) -> str:
    """The page: all models, what looping costs and gains, and how often later loops change a prediction."""
    tokens = recipe.total_steps * recipe.tokens_per_step / 1e6
    models = "\n".join(_model_line(row) for row in rows)
    gains = "\n".join(_claim_line(claim) for claim in claims(rows))
    changes = "\n".join(_change_line(row) for row in rows if row.policy == SPEED)
    text = f"temperature {temperature}" if temperature else "greedy"
    return f"""# Deeper at the same speed

`python -m bench.depth_for_free` (recipe: bench/depth_for_free.toml; {tokens:.1f} million training tokens for
every model; batch 1, fp32, {text}, all models in turn in one process; times and passes
are of all prompts together, each prompt's time the median of several rounds). `2 x 4` is two stored layers
run four times.

| model | decoding | parameters | held-out loss | ms/token | tokens/s | passes/token | texts = plain |
|---|---|---|---|---|---|---|---|
{models}

Held-out loss is in nats a token. `SPEED`: drafts of early loops alone (policy `recheck`). `n-grams`:
what followed the same n-gram earlier in the text is tried beside them (`adaptive`, the server's default); by
itself in a block run once.

## What R loops cost and gain

Time per token over that of the same block run once, and the share of the way in held-out loss from there to
R times as many layers of their own.

| model | plain / plain | SPEED / plain | n-grams / plain | n-grams / n-grams | share of the gain |
|---|---|---|---|---|---|
{gains}

## How often a later loop changes the first loop's token

Held-out text, teacher-forced, greedy tokens. {PAPER}

| model | changed after loop 1 | after loop 2 | held-out loss after each loop |
|---|---|---|---|
{changes}
"""


def _model_line(row: Row) -> str:
    name, mode = _name(row.variant), MODES[row.policy]
    milliseconds = row.milliseconds_per_token
    return (
        f"| {name} | {mode} | {row.parameters / 1e6:.2f} M | {row.loss[-1]:.4f} | {milliseconds:.2f} | "
        f"{1e3 / milliseconds:.0f} | {row.passes_per_token:.3f} | {row.equal_texts:.0%} |"
    )


def _claim_line(claim: Claim) -> str:
    gain = "not measured" if claim.share_of_gain is None else f"{claim.share_of_gain:.0%}"
    times = " | ".join(f"{ratio:.2f}x" for ratio in claim[1:-1])
    return f"| {_name(claim.variant)} | {times} | {gain} |"


def _change_line(row: Row) -> str:
    second = f"{1 - row.agreement[1]:.1%}" if row.variant.loops > 2 else "-"
    losses = ", ".join(f"{loss:.3f}" for loss in row.loss)
    return f"| {_name(row.variant)} | {1 - row.agreement[0]:.1%} | {second} | {losses} |"


def _name(variant: Variant) -> str:
    return f"{variant.layers} x {variant.loops}"


def plot(rows: list[Row], path: Path) -> None:
    """Held-out loss against time per token: looped with SPEED, looped plain, layers of their own."""
    plt = pyplot()

    plt.rcParams["svg.hashsalt"] = NAME  # the same figures give the same file
    shown = [row for row in rows if row.policy in (PLAIN, SPEED)]
    lines = {"layers of their own": [row for row in shown if row.variant.loops == 1]}
    for layers in sorted({row.variant.layers for row in shown if row.policy == SPEED}):
        own = [row for row in shown if row.variant.layers == layers]
        base = [row for row in own if row.variant.loops == 1]
        looped = [row for row in own if row.variant.loops > 1]
        stored = f"{layers} stored layer{'s' if layers > 1 else ''}"
        for policy in (SPEED, PLAIN):
            of_mode = [row for row in looped if row.policy == policy]
            lines[f"{stored} looped, {MODES[policy]}"] = base + of_mode
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (label, points), marker in zip(lines.items(), cycle("^osDv"), strict=False):
        ordered = sorted(points, key=lambda row: row.variant.layers * row.variant.loops)
        times = [row.milliseconds_per_token for row in ordered]
        axes.plot(times, [row.loss[-1] for row in ordered], marker=marker, label=label)
        for row, x in zip(ordered, times, strict=True):
            axes.annotate(
                _name(row.variant), (x, row.loss[-1]), (4, 4), textcoords="offset points", fontsize=8
            )
    write_losses(figure, axes, path, "milliseconds per token, batch 1")
