"""`python -m bench.determinism`: thousands of requests, each alone and in a batch, with and without drafts.

The native library promises that all ways give one text; `--backend torch` says how many do without it.
The reference is plain decoding, one request at a time, prompts read in chunks of 64 by one thread; batches
take turns between chunks of 1, 7 and 64 and between one thread and two. A long run: finished groups are kept
in a state file, so it can be stopped at any time and goes on where it was (`--max-minutes` stops it).
The last line printed is one JSON object; exit status 1 if a text differs that the backend promised.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple, get_args

import msgspec
from tqdm import tqdm

from bench.exactness import texts
from bench.latency import DEFAULT_MODEL
from bench.options import positive, reporting
from bench.prompts import prompts_for
from model.engine import Engine
from model.options import DEFAULT_ROW_BUDGET, KVCacheDtypeName, WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine

AT_ONCE = 16
NUM_PROMPTS, PROMPT_TOKENS = 400, 96  # what the requests' prompts are cut from
MAX_TOKENS = (4, 4, 4, 4, 4, 4, 6, 8, 8, 32)
SAMPLINGS = ((0.0, 1.0), (0.0, 1.0), (0.8, 0.95), (1.0, 1.0))  # temperature, top_p
WAYS = {  # speculation, how many at once; the slower half of them only for every eighth group
    "speculative in a batch": (True, AT_ONCE),
    "plain in a batch": (False, AT_ONCE),
    "speculative alone": (True, 1),
}
ALWAYS, SUBSET = "speculative in a batch", 8


BATCHES = ((1, 2), (7, 1), (64, 2))  # prompt chunks and threads that groups of requests get in turn


class Engines(NamedTuple):
    """One model several times: for single requests, and for batches as `BATCHES` has them."""

    alone: Engine
    together: list[Engine]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=get_args(KVCacheDtypeName))
    parser.add_argument("--backend", default="native", choices=("native", "torch"))
    parser.add_argument("--num-requests", type=positive, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-minutes", type=float, default=None, help="stop after so long")
    parser.add_argument(
        "--state", type=Path, default=None, help="file of what is done (default: by the kind)"
    )


def request_of(index: int, prompts: list[list[int]], seed: int, speculation: bool) -> GenerationRequest:
    """Request number `index`: a piece of a prompt, its sampling and its length follow from the seed."""
    rng = random.Random(f"{seed} {index}")
    prompt = rng.choice(prompts)
    start = rng.randrange(len(prompt))
    temperature, top_p = rng.choice(SAMPLINGS)
    return GenerationRequest(
        request_id=str(index),
        prompt_token_ids=prompt[start : start + rng.randint(1, len(prompt))],
        max_tokens=rng.choice(MAX_TOKENS),
        sampling=SamplingParams(temperature=temperature, top_p=top_p, seed=index),
        ignore_eos=True,
        speculation=speculation,
    )


def compare(engines: Engines, prompts: list[list[int]], indices: range, seed: int) -> list[dict[str, object]]:
    """What became of each request: its sampling, and for each way tried whether the text was the same."""
    plain = [request_of(index, prompts, seed, False) for index in indices]
    expected = texts(engines.alone, plain, 1, "plain alone")
    records: list[dict[str, object]] = [
        {"index": index, "sampled": request.sampling.temperature > 0}
        for index, request in zip(indices, plain, strict=True)
    ]
    for way, (speculation, at_once) in WAYS.items():
        if way != ALWAYS and indices.start // AT_ONCE % SUBSET:
            continue
        requests = [request_of(index, prompts, seed, speculation) for index in indices]
        batching = engines.together[indices.start // AT_ONCE % len(engines.together)]
        engine = engines.alone if at_once == 1 else batching
        got = texts(engine, requests, at_once, way)
        for record, text, wanted in zip(records, got, expected, strict=True):
            record[way] = text == wanted
    return records


def read_state(path: Path, header: dict[str, object]) -> list[dict[str, object]]:
    """Records of the finished requests; raises ValueError if the file is that of another run.

    A last line that was cut short is dropped, with its group.
    """
    if not path.exists():
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    if json.loads(lines[0]) != header:
        raise ValueError(f"{path} belongs to another run: {lines[0]}; this one is {json.dumps(header)}")
    groups = [json.loads(line) for line in lines[1:] if line.endswith("]")]
    path.write_text("\n".join([lines[0], *map(json.dumps, groups)]) + "\n", encoding="utf-8")
    return [record for group in groups for record in group]


def table(records: list[dict[str, object]]) -> dict[str, dict[str, int]]:
    """For each sampling and way: how many texts were compared, and how many differ from the reference."""
    rows: dict[str, dict[str, int]] = {}
    for way in WAYS:
        for name, sampled in (("greedy", False), ("sampled", True)):
            same = [r[way] for r in records if way in r and r["sampled"] == sampled]
            rows[f"{name}, {way}"] = {"compared": len(same), "differ": same.count(False)}
    return rows


def build_engines(args: argparse.Namespace) -> Engines:
    """One engine for single requests and one for batches."""
    options = WorkerOptions(
        model_path=args.model,
        device="cpu",
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        backend=args.backend,
        threads=1,
    )
    batches = [
        msgspec.structs.replace(
            options,
            max_num_seqs=AT_ONCE,
            prefill_chunk_size=chunk,
            prefill_rows=96,
            row_budget=DEFAULT_ROW_BUDGET,
            threads=threads,
        )
        for chunk, threads in BATCHES
    ]
    return Engines(build_engine(options), [build_engine(batch) for batch in batches])


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    """Compares what is not in the state file yet; the records of all that is done."""
    path = args.state or Path(f"determinism-{'-'.join(map(str, _kind(args).values()))}.jsonl")
    header = {**_kind(args), "seed": args.seed}
    records = read_state(path, header)
    deadline = None if args.max_minutes is None else time.monotonic() + args.max_minutes * 60
    first = len(records)
    if first >= args.num_requests:
        return records[: args.num_requests]
    engines = build_engines(args)
    vocab_size = engines.alone.model.config.vocab_size
    prompts = prompts_for(args.model, vocab_size, NUM_PROMPTS, PROMPT_TOKENS, seed=args.seed)
    for start in tqdm(range(first, args.num_requests, AT_ONCE), unit="group", disable=None):
        group = range(start, min(start + AT_ONCE, args.num_requests))
        new = compare(engines, prompts, group, args.seed)
        records += new
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(new) + "\n")
        if deadline is not None and time.monotonic() > deadline:
            break
    engines.alone.check_integrity()
    for engine in engines.together:
        engine.check_integrity()
    return records


def _kind(args: argparse.Namespace) -> dict[str, object]:
    return {
        "dtype": args.dtype,
        "quantization": args.quantization,
        "kv_cache_dtype": args.kv_cache_dtype,
        "backend": args.backend,
    }


@reporting("python -m bench.determinism")
def main() -> int:
    """Runs the comparison; 1 if a text of the native library differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.determinism", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    records = run(args)
    rows = table(records)
    different = [r["index"] for r in records if any(r.get(way) is False for way in WAYS)]
    kind = ", ".join(map(str, _kind(args).values()))
    print(f"{kind}: {len(records)} requests, {len(different)} with a text that differs")
    for name, row in rows.items():
        print(f"  {name}: {row['differ']} of {row['compared']} differ")
    print(json.dumps({**_kind(args), "rows": rows}))
    return 1 if args.backend == "native" and different else 0


if __name__ == "__main__":
    raise SystemExit(main())
