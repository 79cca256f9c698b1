"""The training loop: a task's losses, Muon and AdamW, checkpoints, a loss log in JSON lines.

Knows nothing about data. Invariant: a run that stops at any checkpoint and resumes takes the same steps
on the same batches as one that never stopped.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from model.network.arithmetic import multiplies_bf16
from model.network.looped import LoopedTransformer
from training.checkpoints import load_checkpoint, save_checkpoint
from training.losses import LoopLosses
from training.muon import Float32Muon
from training.recipe import Recipe, Stage

LOG = "log.jsonl"
GRADIENT_CLIP = 1.0
CHECKPOINT_SECONDS = 120.0


class Task(Protocol):
    """What a model is trained on."""

    def losses(self, model: LoopedTransformer, stage: Stage, step: int) -> LoopLosses:
        """Losses of one step's batch, which the recipe's seed and `step` alone decide."""
        ...


class Trainer:
    """One run in one folder. `run` may be called again and again until it returns True.

    `model` is where the run begins, on its device; a checkpoint in the folder replaces its weights.
    """

    def __init__(self, recipe: Recipe, task: Task, folder: Path, model: LoopedTransformer) -> None:
        self.recipe, self.task, self.folder, self.model = recipe, task, folder, model
        self.optimizers = _optimizers(model, recipe)
        self.step = 0
        self.seconds = 0.0
        self._resume()

    def run(self, max_minutes: float, log_every: int = 20) -> bool:
        """Trains for up to `max_minutes` of wall time; True when the recipe's last step is done."""
        started, before, saved = time.monotonic(), self.seconds, self.seconds
        bar = tqdm(total=self.recipe.total_steps, initial=self.step, unit="step", desc="training")
        with bar:
            while self.step < self.recipe.total_steps:
                losses = self.take_step()
                self.seconds = before + time.monotonic() - started
                bar.update()
                if self.step % log_every == 0:
                    self._log(losses.tolist(), bar)
                if self.seconds - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = self.seconds
                if self.seconds - before > max_minutes * 60:
                    break
        self.save()
        return self.step == self.recipe.total_steps

    def take_step(self) -> torch.Tensor:
        """One step of the recipe; cross-entropy per loop (loops,), still on the device."""
        stage, rate = self.recipe.at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.zero_grad()
        with torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=multiplies_bf16(self.model.device)
        ):
            losses = self.task.losses(self.model, stage, self.step)
        losses.total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return losses.per_loop

    def save(self) -> None:
        """Writes the checkpoint, replacing the old one in one move."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_checkpoint(state, self.folder)

    def compile(self) -> None:
        """Compiles each layer; worth it for runs of minutes, since the first steps take half a minute."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)

    def _resume(self) -> None:
        state: dict[str, Any] | None = load_checkpoint(self.folder)
        if state is None:
            return
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak  # the recipe's, which may have got further stages since

    def _log(self, losses: list[float], bar: Any) -> None:  # noqa: ANN401  (tqdm is untyped)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {len(losses)} loops")
        entry = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "loss": [round(loss, 4) for loss in losses],
        }
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def new_model(recipe: Recipe) -> LoopedTransformer:
    """The recipe's model with random weights, decided by its seed."""
    torch.manual_seed(recipe.seed)
    model = LoopedTransformer(recipe.model)
    initialise(model, recipe.embedding_std)
    return model


def initialise(model: LoopedTransformer, embedding_std: float = 0.02) -> None:
    """Random weights from torch's global seed: outputs of sub-layers start at zero."""
    for name, parameter in model.named_parameters():
        if name == "embedding.weight":
            nn.init.normal_(parameter, std=embedding_std)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)


def _optimizers(model: LoopedTransformer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embedding, norms and adapter.

    The adapter reads a state whose channels are tens of times those of the input that it is mixed with: at
    the others' rate one step of it changes more than the model can follow.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not name.startswith("adapter."):
            is_matrix = parameter.ndim == 2 and name.startswith(("layers.", "encoder.layers."))
            (matrices if is_matrix else others).append(parameter)
    muon = (torch.optim.Muon if multiplies_bf16(model.device) else Float32Muon)(
        matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay, momentum=0.95
    )
    adapter = [parameter for name, parameter in model.named_parameters() if name.startswith("adapter.")]
    groups: list[dict[str, Any]] = [{"params": others, "lr": recipe.other_learning_rate}]
    if adapter:
        groups.append({"params": adapter, "lr": recipe.adapter_learning_rate})
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of a run's loss log, oldest first; none if there is no log yet."""
    if not (folder / LOG).exists():
        return
    with (folder / LOG).open() as file:
        yield from map(json.loads, file)
