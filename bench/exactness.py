"""`python -m bench.exactness`: speculation on == off, token for token, alone and with 8 requests at once.

The full run of what tests/ checks with a few prompts: 200 held-out prompts x 64 tokens, greedy and with
seeded sampling. Four ways each: plain alone (the reference), speculative alone, plain together,
speculative together. The last line printed is one JSON object; exit status 1 if any text differs.
"""

import argparse
import json
from typing import get_args

from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import device, positive, reporting
from bench.prompts import prompts_for
from model.checkpoint.loader import DTYPES
from model.engine import Engine
from model.options import BACKENDS, DEFAULT_BACKEND, QuantizationName, WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine, choose

SAMPLINGS = {"greedy": (0.0, 1.0), "sampled": (0.8, 0.95)}  # temperature, top_p
WAYS = {
    "speculative alone": (True, 1),
    "plain together": (False, 8),
    "speculative together": (True, 8),
}


def requests_for(
    prompts: list[list[int]], sampling: tuple[float, float], max_tokens: int, speculation: bool
) -> list[GenerationRequest]:
    """One request a prompt; the prompt's number is its seed."""
    temperature, top_p = sampling
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=temperature, top_p=top_p, seed=index),
            ignore_eos=True,
            speculation=speculation,
        )
        for index, prompt in enumerate(prompts)
    ]


def texts(engine: Engine, requests: list[GenerationRequest], at_once: int, name: str) -> list[list[int]]:
    """The tokens of every request, `at_once` of them in the engine at a time."""
    result = []
    bar = tqdm(range(0, len(requests), at_once), desc=name, unit="group", disable=None)
    for first in bar:
        group = requests[first : first + at_once]
        events = engine.run(group)
        result += [[t for event in events[r.request_id] for t in event.token_ids] for r in group]
    return result


@reporting("python -m bench.exactness")
def main() -> int:
    """Runs the comparison; 0 if every text is the same in every way."""
    parser = argparse.ArgumentParser(prog="python -m bench.exactness", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--device", type=device, default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--quantization", default="auto", choices=get_args(QuantizationName))
    parser.add_argument("--backend", default=DEFAULT_BACKEND, choices=BACKENDS)
    parser.add_argument("--num-prompts", type=positive, default=200)
    parser.add_argument("--max-tokens", type=positive, default=64)
    args = parser.parse_args()
    options = WorkerOptions(
        model_path=args.model,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        backend=args.backend,
    )
    engine = build_engine(options)
    prompts = prompts_for(args.model, engine.model.config.vocab_size, args.num_prompts, 48, seed=1)
    report: dict[str, object] = {
        "prompts": len(prompts),
        "tokens": args.max_tokens,
        "dtype": engine.info.dtype,
        "quantization": choose(options).quantization,
        "backend": engine.info.backend,
    }
    differing = 0
    for sampling, values in SAMPLINGS.items():
        plain = texts(engine, requests_for(prompts, values, args.max_tokens, False), 1, f"{sampling}, plain")
        for way, (speculation, at_once) in WAYS.items():
            requests = requests_for(prompts, values, args.max_tokens, speculation)
            got = texts(engine, requests, at_once, f"{sampling}, {way}")
            different = [
                index for index, pair in enumerate(zip(plain, got, strict=True)) if pair[0] != pair[1]
            ]
            print(f"{sampling}, {way}: {len(different)} of {len(prompts)} texts differ {different or ''}")
            report[f"{sampling}, {way}: texts that differ"] = len(different)
            differing += len(different)
    engine.check_integrity()
    print(json.dumps(report))
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
