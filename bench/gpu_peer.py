"""transformers' `generate` on the same GPU, as a peer: `python -m bench.gpu_peer --model FOLDER`.

The model unrolled, as engines without loops run it (`bench.peer_transformers`), so that every token reads the
block's weights once for each loop. The text is not ours; the time is that of such a model. The figure is the
median over rounds of seconds a token, prompt reading included.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import device, numbers, output_file, positive, reporting
from model.checkpoint.loader import DTYPES, load_model
from model.worker.build import resolve_device


def seconds_of_a_text(model: torch.nn.Module, at_once: int, args: argparse.Namespace) -> float:
    """Seconds that `generate` takes for so many texts together."""
    ids = torch.ones(at_once, args.prompt_tokens, dtype=torch.int64, device=args.place)
    started = time.perf_counter()
    written = model.generate(  # type: ignore[operator] # transformers adds it
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_tokens,
        min_new_tokens=args.max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    written.tolist()  # waits for the device
    return time.perf_counter() - started


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m bench.gpu_peer", description=__doc__)
    made.add_argument("--model", default=str(DEFAULT_MODEL), help="a model's folder (default: embedded)")
    made.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:i")
    made.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    made.add_argument("--requests", type=numbers, default="1,16,64", help="at once, comma-separated")
    made.add_argument("--prompt-tokens", type=positive, default=32)
    made.add_argument("--max-tokens", type=positive, default=64)
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument(
        "--output", type=output_file, default=Path("gpu_peer.json"), help="a file for the results"
    )
    return made


@reporting("python -m bench.gpu_peer")
@torch.inference_mode()
def main() -> int:
    """The command line."""
    args = parser().parse_args()
    from bench.peer_transformers import unrolled  # noqa: PLC0415 - --help needs no transformers

    args.place = resolve_device(args.device)
    model = unrolled(load_model(args.model, args.place, DTYPES[args.dtype]).model)
    found = []
    for at_once in tqdm(args.requests, desc="transformers", unit="size", disable=None):
        seconds_of_a_text(model, at_once, args)  # warms up
        rounds = [seconds_of_a_text(model, at_once, args) for _ in range(args.rounds)]
        middle = statistics.median(rounds)
        found.append({"at_once": at_once, "tokens_per_second": at_once * args.max_tokens / middle})
        print(f"{at_once:4} at once: {found[-1]['tokens_per_second']:.1f} tokens/s")
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
