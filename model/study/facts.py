"""`speed inspect MODEL`: what a checkpoint is, what fits in this memory, and, given a text, how good it is.

Without a text only headers are read, so that the largest checkpoint is described in a moment.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tokenizers import Tokenizer
from torch import nn

from model.checkpoint.hub import model_folder
from model.checkpoint.loader import DTYPES, load_model, load_skeleton
from model.checkpoint.tokenizer import tokenizer_file
from model.network.config import LoopedConfig
from model.network.int4 import BYTES_PER_WEIGHT, round_linears_to_int4
from model.network.looped import LoopedTransformer
from model.options import (
    BACKENDS,
    DEFAULT_BACKEND,
    KVCacheDtypeName,
    QuantizationName,
    SchedulerLimits,
    WorkerOptions,
)
from model.passes.kv import KV_DTYPES
from model.passes.memory import cache_memory, free_memory
from model.schedule.drafts import default_depths
from model.study.quality import Decoding, TextQuality, decode_prompts, judge_held, judge_text, same_tokens
from model.worker.build import Choice, choose, warnings_of

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).resolve().parent.parent / "weights" / "default"
USAGE_ERROR = 2
GB = 2**30


class Facts(NamedTuple):
    """A checkpoint and this machine. Sizes are bytes, `cache_tokens` is what fits beside the weights."""

    model: str
    family: str
    num_loops: int
    layers: str  # prelude + block + coda
    encoder_layers: int  # before a decoder; 0: none
    parameters_stored: int
    parameters_effective: int  # the block's counted once for each loop
    dtype: str
    quantization: str
    backend: str
    weight_bytes: int
    layers_read: dict[int, tuple[int, int]]  # by loops: for a token, plain and with every draft right
    kv_slots: int
    kv_cache_dtype: str
    kv_bytes_per_token: int
    state_bytes_per_token: int
    max_positions: int
    memory_bytes: int
    cache_tokens: int
    full_contexts: int
    eos_token_ids: list[int]
    draft_depths: list[int]


class Report(NamedTuple):
    """Everything that is known; the quality of a text only if one was given."""

    facts: Facts
    text: TextQuality | None = None
    quantized: TextQuality | None = None
    held: TextQuality | None = None  # with K/V in the type that was asked for, all else the same
    decoding: Decoding | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `speed inspect` on a parser."""
    parser.add_argument("model", nargs="?", default=str(EMBEDDED), help="folder or Hugging Face id")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:i")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--quantization", default="auto", choices=get_args(QuantizationName))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=get_args(KVCacheDtypeName))
    parser.add_argument("--backend", default=DEFAULT_BACKEND, choices=BACKENDS)
    parser.add_argument("--max-loops", type=int, default=None, help="as of speed serve")
    parser.add_argument(
        "--text",
        type=Path,
        default=None,
        help="a text that the model was not trained on (for a model without a tokenizer, a JSON list of ids)",
    )
    parser.add_argument("--max-tokens", type=int, default=4096, help="of the text (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens read together (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=4, help="decoded (default: %(default)s)")
    parser.add_argument("--draft-depths", default=None, help="comma separated (default: the model's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Runs `speed inspect`; 2 for what the user can mend."""
    try:
        report = inspect(args)
    except (ValueError, OSError) as error:
        print(f"speed: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    print(json.dumps(as_json(report)) if args.json else as_text(report))
    return 0


def inspect(args: argparse.Namespace) -> Report:
    """The report that the options ask for; raises ValueError (CheckpointError and its like) or OSError."""
    folder = model_folder(args.model, args.revision)
    options = WorkerOptions(
        model_path=str(folder),
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        backend=args.backend,
    )
    choice = choose(options)
    for warning in warnings_of(options, choice):
        log.warning("%s", warning)
    device, name = choice.device, str(args.dtype)
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    facts = gather_facts(args.model, load_skeleton(folder, args.max_loops).to(DTYPES[name]), choice)
    if args.text is None:
        return Report(facts)
    if facts.encoder_layers:
        raise ValueError("--text: this model writes texts for sources, so that a text alone can't be judged")
    drafts = None if args.draft_depths is None else _depths(args.draft_depths)
    ids = read_ids(folder, args.text)[: args.max_tokens]
    model = load_model(folder, device, name).model
    window = min(args.window, model.config.max_positions)
    text = judge_text(model, ids, window, drafts or ())
    quantized, judged = None, model
    if choice.quantization != "none":
        is_int8 = choice.quantization == "int8"
        rounded = load_model(folder, device, name, int8=is_int8).model
        if not is_int8:
            round_linears_to_int4(rounded)
        quantized, judged = judge_text(rounded, ids, window, drafts or ()), rounded
        model = rounded if is_int8 else model  # which the library rounds by itself
    held = None
    if args.kv_cache_dtype != "auto":
        held = judge_held(judged, ids, window, KV_DTYPES[args.kv_cache_dtype], drafts or ())
    decoding = decode_prompts(model, ids, drafts, args.num_prompts, choice.maker)
    return Report(facts, text, quantized, held, decoding)


def _depths(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--draft-depths is {text!r}; whole numbers with commas between them are wanted")
    return tuple(map(int, parts))


def gather_facts(name: str, model: LoopedTransformer, choice: Choice) -> Facts:
    """The facts of a model in its dtype, which needs no weights: `load_skeleton` makes such a one."""
    config, dtype = model.config, model.dtype
    stored = sum(parameter.numel() for parameter in model.parameters())
    once, effective = _parameters_run(model)
    weights = _weight_bytes(model, choice.quantization)
    cache = choice.maker.cache_bytes(model)
    fits = cache_memory(model, choice.device, SchedulerLimits(), weights) // cache.per_token
    return Facts(
        model=name,
        family=config.family,
        num_loops=config.num_loops,
        layers=f"{config.num_prelude_layers} + {config.num_block_layers} + {config.num_coda_layers}",
        encoder_layers=0 if config.encoder is None else config.encoder.num_layers,
        parameters_stored=stored,
        parameters_effective=stored + effective - once,
        dtype=str(dtype).removeprefix("torch."),
        quantization=choice.quantization,
        backend=choice.maker.name,
        weight_bytes=weights,
        layers_read=_layers_read(config),
        kv_slots=config.num_slots + len(config.source_caches),
        kv_cache_dtype=cache.dtype,
        kv_bytes_per_token=cache.keys_and_values,
        state_bytes_per_token=cache.states,
        max_positions=config.max_positions,
        memory_bytes=free_memory(choice.device).free,
        cache_tokens=fits,
        full_contexts=fits // config.max_positions,
        eos_token_ids=list(config.eos_token_ids),
        draft_depths=list(default_depths(config.num_loops, config.most_loops)),
    )


def _parameters_run(model: LoopedTransformer) -> tuple[int, int]:
    """Parameters of the block, counted once, and as often as a token runs through them."""
    config = model.config
    once = total = 0
    for layer in config.block:
        size = sum(parameter.numel() for parameter in model.layers[layer].parameters())
        is_low = config.low_cycles and layer < config.stack_size
        once, total = once + size, total + size * (config.low_cycles if is_low else 1)
    if config.input_injection:
        once, total = once + model.adapter.weight.numel(), total + model.adapter.weight.numel()
    return once, total * config.num_loops


def _layers_read(config: LoopedConfig) -> dict[int, tuple[int, int]]:
    """With every draft right a pass commits a token, and it reads each layer once whatever the loops."""
    prelude, looped, coda = config.layer_reads
    return {
        loops: (prelude + looped * loops + coda, prelude + looped + coda)
        for loops in range(1, config.most_loops + 1)
    }


def read_ids(folder: Path, text: Path) -> list[int]:
    """Token ids of a text file, or the ids in a JSON file for a model without a tokenizer."""
    if (file := tokenizer_file(folder)) is not None:
        tokenizer = Tokenizer.from_file(str(file))
        ids: list[int] = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
        return ids
    try:
        content = json.loads(text.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, list) or not all(type(i) is int and i >= 0 for i in content):
        raise ValueError(f"{folder} has no tokenizer, so {text} must hold a JSON list of token ids")
    return content


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data; draft depths are written as "1,2"."""

    def quality(text: TextQuality) -> dict[str, Any]:
        passes = {",".join(map(str, drafts)): mean for drafts, mean in text.expected_passes.items()}
        depths = [depth._asdict() for depth in text.depths]
        return {"num_tokens": text.num_tokens, "depths": depths, "expected_passes_per_token": passes}

    content: dict[str, Any] = report.facts._asdict()
    if report.text is not None:
        content["text"] = quality(report.text)
    if report.text is not None and report.quantized is not None:
        content["text_quantized"] = quality(report.quantized)
        content["quantization_loss_change"] = report.quantized.loss - report.text.loss
    if report.text is not None and report.held is not None:
        content["text_kv_cache_dtype"] = quality(report.held)
        content["kv_cache_dtype_change"] = _change(report.quantized or report.text, report.held)._asdict()
    if report.decoding is not None:
        content["decoding"] = report.decoding._asdict()
    return content


def as_text(report: Report) -> str:
    """The report as a table."""
    lines = _facts_lines(report.facts)
    kind = report.facts.quantization
    weights = "" if kind == "none" else f", {kind} weights"
    kv = f"{weights}, K/V in {report.facts.kv_cache_dtype}"
    for title, text in (("", report.text), (weights, report.quantized), (kv, report.held)):
        if text is not None:
            lines += ["", *_quality_lines(title, text)]
    if report.text is not None and report.quantized is not None:
        change = report.quantized.loss - report.text.loss
        share = change / report.text.loss
        lines += ["", f"{kind} changes the held-out loss by {change:+.4f} nats per token ({share:+.2%})"]
    if report.text is not None and report.held is not None:
        lines += ["", _held_line(report.facts.kv_cache_dtype, report.quantized or report.text, report.held)]
    if report.decoding is not None:
        lines += ["", _decoding_line(report.decoding)]
    return "\n".join(lines)


def _facts_lines(f: Facts) -> list[str]:
    state = f" and {f.state_bytes_per_token:,} of states" if f.state_bytes_per_token else ""
    encoder = f" behind an encoder of {f.encoder_layers}" if f.encoder_layers else ""
    quantized = "" if f.quantization == "none" else f" ({f.quantization} weights)"
    rows = {
        "model": f.model,
        "family": f"{f.family}, {f.layers} layers (prelude + block + coda){encoder}, {f.num_loops} loops",
        "parameters": f"{f.parameters_stored:,} stored, {f.parameters_effective:,} effective",
        "weights": f"{f.weight_bytes / GB:.2f} GiB as {f.dtype}{quantized}",
        "layers read": _reads_line(f.layers_read),
        "KV cache": f"{f.kv_slots} slots in {f.kv_cache_dtype}, {f.kv_bytes_per_token:,} bytes a token"
        f"{state}",
        "passes": f"by {f.backend}",
        "context": f"{f.max_positions:,} tokens",
        "fits here": f"{f.cache_tokens:,} tokens: {f.full_contexts:,} requests at full context "
        f"({f.memory_bytes / GB:.1f} GiB are free)",
        "ends at": ", ".join(map(str, f.eos_token_ids)) or "no token",
        "drafts at": ", ".join(map(str, f.draft_depths)) or "no depth",
    }
    return [f"{name:<12}{value}" for name, value in rows.items()]


def _reads_line(reads: dict[int, tuple[int, int]]) -> str:
    """For the depths at powers of two and the last."""
    shown = [loops for loops in reads if loops & (loops - 1) == 0 or loops == max(reads)]
    parts = [
        f"{loops} loop{'s' * (loops > 1)}: {reads[loops][0]} plain, {reads[loops][1]} with every draft right"
        f" ({reads[loops][0] / reads[loops][1]:.2f}x)"
        for loops in shown
    ]
    return "for a token; " + "; ".join(parts)


def _quality_lines(title: str, text: TextQuality) -> list[str]:
    lines = [
        f"over {text.num_tokens:,} tokens of the text{title}",
        "depth   loss (nats/token)   right   agrees with the last",
    ]
    lines += [f"{d.depth:>5}{d.loss:>20.4f}{d.accuracy:>8.1%}{d.agreement:>23.1%}" for d in text.depths]
    if text.expected_passes:
        lines += ["", "draft depths   passes per token to expect (greedy)"]
        for drafts, mean in sorted(text.expected_passes.items(), key=lambda item: item[1]):
            lines.append(f"{', '.join(map(str, drafts)):<15}{mean:.3f}")
        lines.append(f"{'none':<15}{len(text.depths):.3f}")
    return lines


class _Change(NamedTuple):
    """What holding K/V in a type changes: the loss in nats per token, and greedy tokens."""

    loss: float
    share: float  # of the loss
    same_tokens: float  # share of positions where the likeliest token is the same


def _change(before: TextQuality, after: TextQuality) -> _Change:
    change = after.loss - before.loss
    return _Change(change, change / before.loss, same_tokens(before, after))


def _held_line(dtype: str, before: TextQuality, after: TextQuality) -> str:
    change = _change(before, after)
    return (
        f"K/V in {dtype} changes the held-out loss by {change.loss:+.4f} nats per token "
        f"({change.share:+.2%}); the likeliest token is the same at {change.same_tokens:.1%} of positions"
    )


def _decoding_line(decoding: Decoding) -> str:
    drafts = ", ".join(map(str, decoding.draft_depths)) or "none"
    return (
        f"decoded {decoding.num_tokens} tokens of its own ({decoding.draft_policy}, draft depths {drafts}): "
        f"{decoding.passes_per_token:.3f} passes and {decoding.rows_per_token:.3f} rows per token"
    )


def _weight_bytes(model: LoopedTransformer, quantization: str) -> int:
    """Bytes of the weights in memory; a tied head counts once, unless quantising parts the two."""
    everything = sum(parameter.nbytes for parameter in model.parameters())
    if quantization == "none":
        return everything
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features > 1]
    tied = [m.weight for m in linears if m.weight is model.embedding.weight]
    own = sum(m.weight.numel() for m in linears) - sum(weight.numel() for weight in tied)
    per_weight, per_output = (1, 4) if quantization == "int8" else (BYTES_PER_WEIGHT, 0)
    held = sum(int(m.weight.numel() * per_weight) + per_output * m.out_features for m in linears)
    return everything - own * model.dtype.itemsize + held
