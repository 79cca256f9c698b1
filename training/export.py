"""A finished run as a checkpoint folder: weights, config, tokenizer, and a model card with its figures.

The figures are those of the exported weights, measured after rounding to the stored dtype. Invariant:
everything the card says was measured in this run.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.loader import load_model, save_checkpoint
from model.network.arithmetic import multiplies_bf16
from training.losses import Evaluation, evaluate
from training.recipe import Recipe
from training.trainer import Trainer

STORED_DTYPE = torch.bfloat16


def export(
    trainer: Trainer, tokenizer: Path, sizes: dict[str, Any], windows: Tensor, folder: Path
) -> Evaluation:
    """Writes the checkpoint of a finished run into `folder`; its figures on held-out `windows`.

    `sizes` is what `speed train` noted of the corpus: its name, and the files, tokens and
    bytes_per_token of "train" and "held_out".
    """
    save_checkpoint(trainer.model, folder, STORED_DTYPE)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    figures = evaluate(load_model(folder, dtype="float32").model, windows)
    (folder / "README.md").write_text(_card(trainer, sizes, figures, folder))
    return figures


def _card(trainer: Trainer, sizes: dict[str, Any], figures: Evaluation, folder: Path) -> str:
    recipe = trainer.recipe
    model, megabytes = recipe.model, (folder / "model.safetensors").stat().st_size / 1e6
    parameters = sum(p.numel() for p in trainer.model.parameters())
    train, held_out = sizes["train"], sizes["held_out"]
    rows = "\n".join(
        f"| {depth} | {loss:.4f} | {loss / held_out['bytes_per_token'] / 0.6931:.4f} | {share:.1%} |"
        for depth, (loss, share) in enumerate(zip(*figures, strict=True), start=1)
    )
    arithmetic = "bfloat16 autocast" if multiplies_bf16(trainer.model.device) else "float32"
    return f"""# A small looped model of Python source code

{model.num_block_layers} layers x {model.num_loops} loops, width {model.hidden_size}, \
{model.vocab_size} tokens, context {model.max_positions}: {parameters / 1e6:.2f} million parameters, \
{megabytes:.1f} MB in bfloat16, in the `nanbeige` layout with `skip_loop_final_norm`. It completes Python; \
it is no chat model, and what it writes is often wrong: it is there to show how a looped model is served.

## Data

{sizes["corpus"]}: {train["files"]} files, {train["tokens"] / 1e6:.2f} million tokens of \
{train["bytes_per_token"]:.2f} bytes for training; {held_out["files"]} files, \
{held_out["tokens"] / 1e6:.2f} million tokens held out, split by a hash of the file's path. \
The tokenizer (byte-level BPE) was trained on the training files alone.

## Training

{recipe.total_steps} steps of {recipe.tokens_per_step} tokens ({_tokens_seen(recipe) / 1e6:.1f} million) in \
{trainer.seconds / 60:.0f} minutes on {os.cpu_count()} CPU cores, from random weights: {_stages(recipe)}. \
Cross-entropy after every loop, loop r weighing {_weights(recipe)} (later loops heavier, as in SPEED, \
Hooper et al. 2023), plus the divergence of early readouts from the last one. Muon for the layers, AdamW \
for the rest, {arithmetic}. \
`speed train --output FOLDER` does it again.

## Held-out figures of these weights

| loop | loss (nats a token) | bits a byte | greedy token = last loop's |
|---|---|---|---|
{rows}
"""


def _tokens_seen(recipe: Recipe) -> int:
    lengths = [
        (s.steps, recipe.tokens_per_step // s.sequence_length * s.sequence_length) for s in recipe.stages
    ]
    return sum(steps * tokens for steps, tokens in lengths)


def _weights(recipe: Recipe) -> str:
    return " or ".join(f"r^{power:g}" for power in sorted({stage.depth_power for stage in recipe.stages}))


def _stages(recipe: Recipe) -> str:
    return ", ".join(
        f"{stage.steps} steps with {stage.num_loops} loop{'s' * (stage.num_loops > 1)} over "
        f"{stage.sequence_length} tokens"
        for stage in recipe.stages
    )
