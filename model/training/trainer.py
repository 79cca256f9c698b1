"""The training loop: seeded batches, Muon and AdamW, checkpoints, a loss log in JSON lines.

Invariant: a run that stops at any checkpoint and resumes takes the same steps on the same batches
as one that never stopped.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.looped import LoopedTransformer
from model.training.corpus import Tokens
from model.training.losses import loop_losses
from model.training.recipe import Recipe, Stage

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
EVALUATION_WINDOWS, EVALUATION_LENGTH = 48, 512
GRADIENT_CLIP = 1.0


class Trainer:
    """One run in one folder. `run` may be called again and again until it returns True."""

    def __init__(self, recipe: Recipe, train: Tokens, held_out: Tokens, folder: Path) -> None:
        self.recipe, self.train, self.folder = recipe, train, folder
        self.windows = _fixed_windows(held_out)
        torch.manual_seed(recipe.seed)
        self.model = LoopedTransformer(recipe.model)
        initialise(self.model)
        self.optimizers = _optimizers(self.model, recipe)
        self.step = 0
        self.seconds = 0.0
        self._resume()

    def run(self, max_minutes: float, log_every: int = 20, checkpoint_every: int = 100) -> bool:
        """Trains for up to `max_minutes` of wall time; True when the recipe's last step is done."""
        started, before = time.monotonic(), self.seconds
        bar = tqdm(total=self.recipe.total_steps, initial=self.step, unit="step", desc="training")
        with bar:
            while self.step < self.recipe.total_steps:
                losses = self._take_step()
                self.seconds = before + time.monotonic() - started
                bar.update()
                if self.step % log_every == 0:
                    bar.set_postfix_str(f"loss {losses[-1]:.3f}, {len(losses)} loops")
                    self._log({"loss": [round(x, 4) for x in losses]})
                if self.step % checkpoint_every == 0:
                    self.save()
                if self.seconds - before > max_minutes * 60:
                    break
        self.save()
        return self.step == self.recipe.total_steps

    def save(self) -> None:
        """Writes the checkpoint, replacing the old one in one move."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.folder / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        partial.replace(self.folder / CHECKPOINT)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _take_step(self) -> list[float]:
        stage, rate = self.recipe.at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = loop_losses(self.model, self._batch(stage), stage)
        losses.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return losses.per_loop.tolist()

    def _batch(self, stage: Stage) -> Tensor:
        """Windows at random offsets (batch, length + 1), a function of the seed and the step alone."""
        rng = np.random.default_rng([self.recipe.seed, self.step])
        count = max(1, self.recipe.tokens_per_step // stage.sequence_length)
        starts = rng.integers(0, len(self.train) - stage.sequence_length - 1, count)
        rows = [self.train[s : s + stage.sequence_length + 1] for s in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _log(self, entry: dict[str, object]) -> None:
        line = {"step": self.step, "seconds": round(self.seconds, 1), **entry}
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")


def initialise(model: LoopedTransformer) -> None:
    """Random weights from torch's global seed: outputs of sub-layers start at zero."""
    for name, parameter in model.named_parameters():
        if name == "embedding.weight":
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)


def _optimizers(model: LoopedTransformer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embedding and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and name.startswith("layers.") else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay, momentum=0.95
    )
    adam = torch.optim.AdamW(others, lr=recipe.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def _fixed_windows(tokens: Tokens) -> Tensor:
    """Evenly spread windows (count, length + 1) of the held-out tokens."""
    starts = np.linspace(0, len(tokens) - EVALUATION_LENGTH - 1, EVALUATION_WINDOWS).astype(int)
    rows = np.stack([tokens[s : s + EVALUATION_LENGTH + 1] for s in starts])
    return torch.from_numpy(rows.astype(np.int64))


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of a run's loss log, oldest first."""
    with (folder / LOG).open() as file:
        yield from map(json.loads, file)
