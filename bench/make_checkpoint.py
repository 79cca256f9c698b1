"""Checkpoints with random weights in the layout of the real ones: `python -m bench.make_checkpoint`.

For measuring what only depends on sizes (loading, memory, the time of a pass) where the real weights are
not at hand. Names and shapes come from the families' own tables, so whatever can be served can be made.
Weights are normal with standard deviation 0.02, norms are 1, scales of unit vectors 0.02, as before their
training; drafts are mostly wrong, as they must be.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.options import reporting
from model.checkpoint.families import Family, Place, families_of
from model.checkpoint.hub import INDEX_FILE
from model.checkpoint.loader import DTYPES
from model.network.config import LoopedConfig
from model.network.looped import LoopedTransformer

OURO = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 24,
    "total_ut_steps": 4,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NANBEIGE = {
    "architectures": ["NanbeigeForCausalLM"],
    "model_type": "nanbeige",
    "vocab_size": 166144,
    "hidden_size": 2560,
    "intermediate_size": 10496,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 22,
    "num_loops": 2,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 70000000.0,
}
HUGINN = {
    "architectures": ["RavenForCausalLM"],
    "model_type": "huginn_raven",
    "vocab_size": 65536,
    "n_embd": 5280,
    "intermediate_size": 17920,
    "n_heads": 55,
    "num_key_value_heads": 55,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "mean_recurrence": 32,
    "block_size": 4096,
    "rope_base": 50000,
    "qk_bias": True,
    "tie_embeddings": True,
}
DORY = {
    "architectures": ["DoryForCausalLM"],
    "model_type": "dory",
    "vocab_size": 131072,
    "hidden_size": 2560,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "num_hidden_layers": 72,  # entries, of which a layer is two: attention and mlp
    "n_input_layers": 16,
    "n_recurrent_layers": 40,
    "n_output_layers": 16,
    "n_recurrent_loops": 2,
    "layer_types": [*["sliding_attention", "mlp"] * 3, "full_attention", "mlp"] * 9,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "initializer_range": 0.02,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10000000.0},
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRESETS: dict[str, dict[str, Any]] = {
    "ouro-1.4b": OURO,
    "nanbeige-3b": NANBEIGE,
    "huginn-3.5b": HUGINN,
    "dory-4b": DORY,
}
SHARD_BYTES = 2**30
DEVIATION = 0.02  # of the weights


def write(folder: Path, raw: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> int:
    """Writes config.json and shards of about a gigabyte; the number of weights. Raises ConfigError."""
    family = families_of(raw)[0]
    config = family.read_config(raw)
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, str] = {}
    total = 0
    torch.manual_seed(seed)
    for number, tensors in enumerate(_shards(family, config, dtype)):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() for tensor in tensors.values())
    _write_json(
        folder / INDEX_FILE, {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": shards}
    )
    _write_json(folder / "config.json", {**raw, "torch_dtype": str(dtype).removeprefix("torch.")})
    return total


def _shards(family: Family, config: LoopedConfig, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups that fit a file each; no more than one group is ever in memory."""
    with torch.device("meta"):
        parameters = LoopedTransformer(config).state_dict()
    group: dict[str, Tensor] = {}
    for name, place in family.places(config):
        if place is None or place.parameter not in parameters:
            continue
        if config.tie_embeddings and place.parameter == "head.weight":
            continue
        group[name] = _random(parameters[place.parameter], place, config, dtype)
        if sum(tensor.nbytes for tensor in group.values()) >= SHARD_BYTES:
            yield group
            group = {}
    if group:
        yield group


def _random(parameter: Tensor, place: Place, config: LoopedConfig, dtype: torch.dtype) -> Tensor:
    shape = place.shape(config) if place.shape else parameter[place.rows(config)].shape
    if "norm" in place.parameter:
        return torch.ones(shape, dtype=dtype)
    if place.parameter.endswith(("_scale", "_rate")):
        return torch.full(shape, DEVIATION, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(std=DEVIATION)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _change(text: str) -> tuple[str, Any]:
    field, _, value = text.partition("=")
    try:
        return field, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=JSON") from None


@reporting("python -m bench.make_checkpoint")
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.make_checkpoint", description="Writes a checkpoint with random weights."
    )
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="ouro-1.4b")
    parser.add_argument(
        "--set",
        type=_change,
        action="append",
        default=[],
        metavar="FIELD=JSON",
        help="changes a field of config.json, e.g. --set num_hidden_layers=4",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = {**PRESETS[args.preset], **dict(args.set)}
    count = write(args.output, config, DTYPES[args.dtype], args.seed)
    print(f"{args.output}: {count / 1e9:.3f} billion weights in {args.dtype}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
