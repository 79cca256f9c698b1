"""`python -m bench.native_fuzz`: passes of drawn models over drawn texts, held to the torch reference.

A case is a model (sizes, norms, loops, windows, biases, one stack or two, an encoder, weight type) with texts
on scattered pages of a cache that is full of others' numbers. They are read in chunks, several of one text at
different loops in a pass, as speculation has them, with whichever other texts are drawn. Every logit must be
the reference's. With `scripts/sanitize` the library also watches its own memory. A case is made of `--seed`
and its number alone: `--first N --cases 1` runs one again.
"""

import argparse
import ctypes
import functools
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from bench.options import count, positive, reporting
from model.checkpoint.loader import LoadedModel
from model.network.config import (
    ACTIVATIONS,
    EncoderConfig,
    InitialState,
    LoopedConfig,
    NormKind,
    NormPlacement,
    RelativeBias,
    RopeConfig,
)
from model.network.int4 import round_linears_to_int4
from model.network.int8 import quantize_linears
from model.network.looped import LoopedTransformer
from model.options import KVCacheDtypeName
from model.passes.kv import KV_DTYPES, read_back
from model.passes.native import backend, weights
from model.passes.native.backend import NativeOptions, NativePasses, RowArrays
from model.passes.native.structs import PAGE

NUM_PAGES, LONGEST = 32, 77  # of the cache; tokens of a text
MOST_CHUNKS = 4  # of a text
# Not interpolation, whose models have norms and scales of their own.
PLACEMENTS = (NormPlacement.PRE, NormPlacement.SANDWICH, NormPlacement.POST_ADD, NormPlacement.OUTPUT)
WEIGHTS = ("fp32", "bf16", "int8", "int4")
# Of the largest logit: rounding of activations to 1 / 32258 of a row's largest adds up. K/V is rounded in the
# reference too, but a number that stands between two steps may be rounded to the other one.
LIMITS = {"fp32": 2e-4, "bf16": 2e-4, "int8": 1e-2, "int4": 1e-2}
# What differs in the last bit of fp32 may be rounded to the next number of K/V, in bf16 eight times as far
# off as in fp16. (Case 2168 of seed 0: 0.0007 with K/V in fp32, 0.004, 0.043 and 0.049 in the others.)
KV_LIMITS: dict[KVCacheDtypeName, float] = {"float32": 0.0, "float16": 3e-2, "bfloat16": 0.2, "int8": 0.2}
OTHERS = 0x6B  # every byte of memory that others have used: about 3,800 in fp16, 2.8e26 in fp32

Floats = NDArray[np.float32]


class Case(NamedTuple):
    """What is drawn for one run."""

    config: LoopedConfig
    weights: str
    options: NativeOptions
    texts: "list[Text]"

    @property
    def limit(self) -> float:
        """The largest difference, as a share of the largest logit."""
        return max(LIMITS[self.weights], KV_LIMITS[self.options.held_in])


@dataclass
class Text:
    """Tokens in chunks on pages of the cache, each chunk so many loops on its way to `loops`.

    The first `prefix` tokens see one another both ways; behind an encoder there is a source.
    """

    tokens: list[int]
    chunks: list[range]
    pages: list[int]
    loops: int
    state: Floats | None  # (tokens, hidden) that the first loop starts from, or zeros
    prefix: int
    source: list[int]
    source_pages: list[int]
    done: list[int] = field(default_factory=list)
    logits: list[Floats] = field(default_factory=list)

    @property
    def is_new(self) -> bool:
        """Whether nothing has run."""
        return not any(self.done)

    @property
    def is_read(self) -> bool:
        """Whether nothing is left to run."""
        return self.done[-1] == self.loops

    def next_chunks(self, rng: random.Random) -> list[int]:
        """Chunks that run in the next pass, in order: what they attend to is there or made in the pass."""
        running: list[int] = []
        for index, done in enumerate(self.done):
            before = self.done[index - 1] if index else self.loops
            ready = before > done or (before == done and index - 1 in running) or index == 0
            if done < self.loops and ready and (not running or rng.random() < 0.7):
                running.append(index)
        return running


def draw_case(rng: random.Random) -> Case:
    """A model, how it is held, and what it reads."""
    config = draw_config(rng)
    texts, free = list[Text](), rng.sample(range(NUM_PAGES), NUM_PAGES)
    for _ in range(rng.randint(1, 3)):
        length = draw_length(rng)
        pages = [free.pop() for _ in range(-(-length // PAGE))]
        cuts = sorted(rng.sample(range(1, length), min(length - 1, rng.randrange(MOST_CHUNKS))))
        chunks = [range(a, b) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        tokens = [rng.randrange(config.vocab_size) for _ in range(length)]
        noise = np.random.default_rng(rng.getrandbits(32)).normal(size=(length, config.hidden_size))
        state = noise.astype(np.float32) if config.has_noisy_start and rng.random() < 0.5 else None
        source = [rng.randrange(config.vocab_size) for _ in range(draw_length(rng) if config.encoder else 0)]
        source_pages = [free.pop() for _ in range(-(-len(source) // PAGE))]
        prefix = len(chunks[0]) if config.prefix_lm else 0
        loops, done = rng.randint(1, config.num_loops), [0] * len(chunks)
        texts.append(Text(tokens, chunks, pages, loops, state, prefix, source, source_pages, done))
    kind = rng.choice(WEIGHTS)
    options = NativeOptions(
        threads=rng.randint(1, 3),
        kv_dtype=rng.choice([*KV_LIMITS]),
        int4=kind == "int4",
        spin_microseconds=20,
    )
    return Case(config, kind, options, texts)


def draw_length(rng: random.Random) -> int:
    """Of a text or a source."""
    return rng.choice([1, rng.randint(2, 20), rng.randint(17, LONGEST)])


def draw_config(rng: random.Random) -> LoopedConfig:
    """A model of one stack, of two, or behind an encoder."""
    config = draw_stack(rng)
    kind = rng.choice(["one stack", "one stack", "two stacks", "behind an encoder"])
    if kind == "one stack":
        return config
    alone = replace(
        config,
        num_prelude_layers=0,
        num_coda_layers=0,
        input_injection=False,
        sliding_window=None,
        sliding_layers=(),
        first_loop_gate=False,
    )
    if kind == "two stacks":
        return replace(
            alone,
            num_block_layers=2 * rng.randint(1, 2),
            low_cycles=rng.randint(1, 3),
            norm_kind=rng.choice([NormKind.PLAIN, NormKind.RMS]),
            norm_after_loop=True,
            prefix_lm=rng.random() < 0.5,
        )
    heads = rng.randint(1, 4)
    buckets = rng.randint(4, 32)
    return replace(
        alone,
        num_heads=heads,
        num_kv_heads=heads,
        embedding_scale=1.0,
        attention_scale=rng.choice([None, 1.5 * config.head_dim**-0.5]),
        gated_mlp=rng.random() < 0.5,
        head_scale=rng.choice([1.0, 0.3]),
        encoder=EncoderConfig(rng.randint(1, 3), 0),
        relative_bias=RelativeBias(buckets, rng.randint(buckets // 2 + 1, 2 * LONGEST)),
    )


def draw_stack(rng: random.Random) -> LoopedConfig:
    """Sizes that fill no block, page or vector as often as those that do.

    From 8 channels on: a norm over one or two makes a change of sign of a rounding error.
    """

    def maybe() -> bool:
        return rng.random() < 0.4

    kv_heads, head_dim = rng.randint(1, 3), rng.choice([2, 6, 8, 16, 18, 32, 34, 64])
    prelude, block, coda = rng.randrange(3), rng.randint(1, 2), rng.randrange(3)
    window = rng.randint(1, 40) if maybe() else None
    layers = range(prelude + block + coda)
    return LoopedConfig(
        family="drawn",
        vocab_size=rng.randint(2, 120),
        hidden_size=rng.choice([rng.randint(8, 90), 32, 64]),
        intermediate_size=rng.choice([rng.randint(8, 120), 32, 64]),
        num_heads=kv_heads * rng.randint(1, 6),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_prelude_layers=prelude,
        num_block_layers=block,
        num_coda_layers=coda,
        num_loops=rng.randint(1, 4),
        max_positions=LONGEST,
        norm_placement=rng.choice(PLACEMENTS),
        norm_after_loop=maybe(),
        norm_before_coda=maybe(),
        input_injection=maybe(),
        initial_state=rng.choice(list(InitialState)),
        embedding_scale=rng.choice([1.0, 3.0]),
        activation=rng.choice(sorted(ACTIVATIONS)),
        qkv_bias=maybe(),
        output_bias=maybe(),
        mlp_bias=maybe(),
        qk_norm=maybe(),
        qk_bias=maybe(),
        output_gate=maybe(),
        tie_embeddings=maybe(),
        sliding_window=window,
        sliding_layers=tuple(layer for layer in layers if window and maybe()),
        first_loop_gate=window is not None and maybe(),
        rope=RopeConfig(interleaved=maybe(), rotary_dim=rng.randrange(2, head_dim + 1, 2)),
    )


def draw_model(config: LoopedConfig, seed: int) -> LoopedTransformer:
    """Random weights that keep activations near 1, biases too."""
    generator = torch.Generator().manual_seed(seed)
    model = LoopedTransformer(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        elif "bias" in name or name == "low_state":
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def held(config: LoopedConfig, kind: str, seed: int) -> tuple[LoopedTransformer, LoopedTransformer]:
    """The model as the library packs it, and the same numbers for torch, in fp32; may be one and the same."""
    given = draw_model(config, seed)
    if kind == "fp32":
        return given, given
    if kind == "int8":
        quantize_linears(given)
        return given, given
    reference = draw_model(config, seed)
    if kind == "bf16":
        return given.to(torch.bfloat16), reference.to(torch.bfloat16).float()
    round_linears_to_int4(reference)
    return given, reference


def run_pass(passes: NativePasses, texts: list[Text], rng: random.Random) -> None:
    """One pass over chunks of the texts; keeps the logits of those that end their last loop.

    Sources of texts that begin are encoded before.
    """
    if new := [text for text in texts if text.source and text.is_new]:
        passes.run(source_rows(new), (), ())
    columns: dict[str, list[int]] = {name: [] for name in ("tokens", "positions", "loops", "tables", "ends")}
    pages, noises, noise, readouts = list[int](), list[int](), list[Floats](), list[int]()
    ending = list[tuple[Text, int]]()
    seen: dict[str, list[int]] = {name: [] for name in ("lasts", "source_tables", "source_lasts")}
    for text in texts:
        for index in text.next_chunks(rng):
            chunk, loop = text.chunks[index], text.done[index]
            first, last = len(columns["tokens"]), loop == text.loops - 1
            columns["tokens"] += [text.tokens[position] for position in chunk]
            columns["positions"] += chunk
            for name, value in (("loops", loop), ("tables", len(pages)), ("ends", int(last))):
                columns[name] += [value] * len(chunk)
            seen["lasts"] += [max(position, text.prefix - 1) for position in chunk]
            seen["source_tables"] += [len(pages) + len(text.pages)] * len(chunk)
            seen["source_lasts"] += [len(text.source) - 1] * len(chunk)
            starts = text.state is not None and loop == 0
            noises += range(len(noise), len(noise) + len(chunk)) if starts else [-1] * len(chunk)
            if starts and text.state is not None:
                noise += [text.state[position] for position in chunk]
            if last:
                readouts += range(first, first + len(chunk))
                ending.append((text, len(chunk)))
            text.done[index] += 1
        pages += [*text.pages, *text.source_pages]
    rows = RowArrays(
        tokens=np.array(columns["tokens"], np.int32),
        positions=np.array(columns["positions"], np.int32),
        loops=np.array(columns["loops"], np.int32),
        tables=np.array(columns["tables"], np.int32),
        pages=np.array(pages, np.int32),
        ends=np.array(columns["ends"], np.uint8),
        noises=np.array(noises, np.int32) if noise else None,
        noise=np.stack(noise) if noise else None,
        lasts=seen["lasts"] if passes.config.prefix_lm else None,
        source_tables=seen["source_tables"] if passes.config.encoder else None,
        source_lasts=seen["source_lasts"] if passes.config.encoder else None,
    )
    result = passes.run(rows, np.array(readouts, np.int32), np.arange(len(readouts), dtype=np.int32))
    if result.tokens != result.logits.argmax(-1).tolist():
        raise ValueError("a token is not the likeliest one")
    start = 0
    for text, size in ending:
        text.logits.append(result.logits[start : start + size])
        start += size


def source_rows(texts: list[Text]) -> RowArrays:
    """The sources of texts, to be encoded together."""
    tokens, positions, tables, lasts = list[int](), list[int](), list[int](), list[int]()
    pages = list[int]()
    for text in texts:
        size = len(text.source)
        tokens += text.source
        positions += range(size)
        tables += [len(pages)] * size
        lasts += [size - 1] * size
        pages += text.source_pages
    nothing = [0] * len(tokens)
    return RowArrays(
        tokens, positions, nothing, tables, pages, bytearray(len(tokens)), lasts=lasts, encoded=True
    )


def run_case(seed: int, number: int, level: str | None) -> tuple[Case, float]:
    """Runs a case; the largest difference as a share of the largest logit (or of 1)."""
    rng = random.Random(f"{seed}/{number}")
    case = draw_case(rng)
    given, reference = held(case.config, case.weights, number)
    options = NativeOptions(**{**vars(case.options), "level": level})
    passes = NativePasses(given, NUM_PAGES * PAGE, LONGEST, options)
    passes.fill_cache(OTHERS)
    while running := [text for text in case.texts if not text.is_read]:
        run_pass(passes, rng.sample(running, rng.randint(1, len(running))), rng)
    worst = 0.0
    reference.read_back = functools.partial(read_back, dtype=KV_DTYPES[options.held_in])
    for text in case.texts:
        loaded, prefix = LoadedModel(reference, case.config), text.prefix or None
        wanted = loaded.logits(text.tokens, text.loops, text.state, prefix, text.source or None).numpy()
        difference = np.abs(np.concatenate(text.logits) - wanted).max() / max(1.0, np.abs(wanted).max())
        worst = max(worst, float(difference)) if np.isfinite(difference) else float("inf")
    return case, worst


def exact_memory(size: int, *, huge: bool = False) -> NDArray[np.uint8]:
    """Memory from malloc, zeroed, aligned to 64, that ends where it is said to: so reading on is seen."""
    del huge
    libc, address = ctypes.CDLL(None), ctypes.c_void_p()
    if libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(64), ctypes.c_size_t(max(size, 1))):
        raise MemoryError(f"{size} bytes")
    assert address.value is not None
    ctypes.memset(address, 0, size)
    array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address.value))
    free: Callable[[Any], object] = libc.free
    weakref.finalize(array.base, free, address)
    return array


@reporting("python -m bench.native_fuzz")
def main() -> int:
    """The command line; 1 if a case differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.native_fuzz", description=__doc__)
    parser.add_argument("--cases", type=positive, default=1000)
    parser.add_argument("--first", type=count, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", help="of CPU instructions (default: the best)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    vars(weights)["allocate"] = vars(backend)["allocate"] = exact_memory
    worst: dict[str, float] = {}
    for number in tqdm(range(args.first, args.first + args.cases), desc="cases", unit="case", disable=None):
        case, difference = run_case(args.seed, number, args.level)
        kind = f"{case.weights}, K/V in {case.options.held_in}"
        worst[kind] = max(worst.get(kind, 0.0), difference)
        if not difference < case.limit:
            print(
                f"case {number} of seed {args.seed} differs by {difference:.2g}, {case.limit} is the limit: "
            )
            print(*case[:-1], *(text.chunks for text in case.texts), sep="\n")
            return 1
    for kind in sorted(worst):
        print(f"{kind}: differs by {worst[kind]:.1e} of the largest logit at most")
    print(f"{args.cases} cases, none differs beyond its limit")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
