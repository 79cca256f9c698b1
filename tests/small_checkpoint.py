"""A small chat checkpoint made on the spot: random weights, a tokenizer and a chat template of its own.

What it says is noise, and the same noise whatever the embedded model may be: a test that passes with it
depends on no model's words. Special tokens, template and defaults of sampling are as chat models have them.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import save_checkpoint
from tests.tiny_models import tiny_model

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE, CONTEXT, LOOPS = 512, 2048, 4
# As a chat model's: greedy is temperature 0 and repetition_penalty 1, both said.
SAMPLING_DEFAULTS = {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.15, "eos_token_id": [2, 0]}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What tokens are learned from: words, digits, and the quotes and brackets that structured output ends with.
TEXT = """The water of the river runs down to the sea, and the wind that comes from there brings rain.
What do people say when they have nothing to say? They talk about the weather, the food and the children.
One, two, three, four, five, six, seven, eight, nine, ten. A house has a door, some windows and a roof.
user system assistant Hello! How are you today? I am well, thank you. What is your name, and how old?
{"name": "Ann", "age": 34, "tags": ["a", "b"], "point": {"x": 10, "y": 207}} [1, 2, 3] (5,8) "yes", "no"
import os\n    for item in items:\n        print(item)\n    return value\nclass Queue:\n    def first(self):
"""


def write_small_checkpoint(folder: Path, *, seed: int = 3) -> Path:
    """Fills `folder` with a model that `speed serve` can serve, and returns it."""
    tokenizer = small_tokenizer()
    model = tiny_model(
        seed=seed,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_loops=LOOPS,
        max_positions=CONTEXT,
        bos_token_id=0,
        eos_token_ids=(0, 2),
    )
    save_checkpoint(model, folder, torch.float32)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING_DEFAULTS))
    return folder


def small_tokenizer() -> Tokenizer:
    """Byte-level BPE of at most `VOCAB_SIZE` tokens; the special ones are the first three."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer
