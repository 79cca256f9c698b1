"""`python -m bench.soak`: thousands of requests of mixed length with random aborts through one engine.

Requests come in bursts of random size, begin with shared prefixes or not, are greedy or sampled, of any
policy, and are aborted at random; the KV cache is small, so that sequences are pre-empted as well. Every
request must end exactly once, the same request must always say the same, no page may be lost and memory
must stay flat. The last line printed is one JSON object; exit status 1 if anything of that fails.
"""

import argparse
import json
import random
from collections import Counter

from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import at_least, count, device, positive, reporting
from bench.prompts import prompts_for
from model.checkpoint.loader import DTYPES
from model.engine import Engine
from model.machine import process_memory
from model.options import POLICIES, WorkerOptions
from model.protocol import GenerationRequest, SamplingParams, TokenEvent
from model.worker.build import build_engine

ABORT_SHARE = 0.1
NUM_TEXTS = 200  # different requests; each comes again and again
REPORTS = 10
LONGEST_PROMPT, LENGTHS = 64, (1, 2, 4, 8, 8, 16, 100)  # tokens
LONGEST = LONGEST_PROMPT + max(LENGTHS)
FLAT = 1.05  # growth of memory over the last half that still counts as none


class Soak:
    """Feeds an engine and keeps the books."""

    def __init__(self, engine: Engine, prompts: list[list[int]], seed: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.prompts = prompts
        self.running: dict[str, int] = {}  # request id -> which text
        self.said: dict[str, list[int]] = {}
        self.texts: dict[int, list[int]] = {}
        self.ends: Counter[str] = Counter()
        self.num_started = 0
        self.faults: list[str] = []

    def add(self) -> None:
        """One more request."""
        number = self.rng.randrange(NUM_TEXTS)
        shape = random.Random(number)
        prompt = self.prompts[shape.randrange(len(self.prompts))][: shape.randint(1, LONGEST_PROMPT)]
        name = str(self.num_started)
        self.num_started += 1
        self.running[name], self.said[name] = number, []
        request = GenerationRequest(
            request_id=name,
            prompt_token_ids=prompt,
            max_tokens=shape.choice(LENGTHS),
            sampling=SamplingParams(temperature=shape.choice((0.0, 0.8)), top_p=0.95, seed=number),
            ignore_eos=True,
            draft_policy=self.rng.choice(POLICIES),  # says nothing about the text
        )
        self.engine.add(request)

    def step(self) -> None:
        """One pass; now and then somebody leaves."""
        if self.running and self.rng.random() < ABORT_SHARE / 8:
            self.engine.abort(self.rng.choice(list(self.running)))
        for event in self.engine.step():
            self._take(event)

    def _take(self, event: TokenEvent) -> None:
        if event.request_id not in self.running:
            self.faults.append(f"request {event.request_id} went on after its end")
            return
        self.said[event.request_id] += event.token_ids
        if event.finish_reason is None:
            return
        self.ends[event.finish_reason] += 1
        number, said = self.running.pop(event.request_id), self.said.pop(event.request_id)
        known = self.texts.setdefault(number, said)
        if len(said) > len(known):
            self.texts[number] = said
        if event.finish_reason == "error" or said[: len(known)] != known[: len(said)]:
            self.faults.append(f"request {event.request_id} ({event.finish_reason}) says something else")


@reporting("python -m bench.soak")
def main() -> int:
    """Runs the soak."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--device", type=device, default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    parser.add_argument("--num-requests", type=positive, default=10_000)
    parser.add_argument("--kv-cache-tokens", type=at_least(LONGEST), default=1536)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = WorkerOptions(
        model_path=args.model,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        max_model_len=LONGEST,
        kv_cache_tokens=args.kv_cache_tokens,
    )
    engine = build_engine(options)
    prompts = prompts_for(args.model, engine.model.config.vocab_size, 40, LONGEST_PROMPT, seed=5)
    soak, memory = Soak(engine, prompts, args.seed), list[float]()
    with tqdm(total=args.num_requests, unit="request", disable=None) as bar:
        while soak.num_started < args.num_requests:
            for _ in range(soak.rng.randint(1, 60)):
                soak.add()
                bar.update()
            while len(soak.running) > soak.rng.randint(0, 60):
                soak.step()
            if soak.num_started * REPORTS // args.num_requests > len(memory):
                while soak.running:
                    soak.step()
                engine.check_integrity()
                memory.append(round(process_memory() / 2**20, 1))
    while soak.running:
        soak.step()
    engine.check_integrity()
    return report(soak, memory)


def report(soak: Soak, memory: list[float]) -> int:
    """Prints what happened; 1 if something is wrong."""
    stats = soak.engine.stats
    if memory and memory[-1] > FLAT * memory[len(memory) // 2]:
        soak.faults.append("memory grew")
    print(f"{soak.num_started} requests; ends: {dict(soak.ends)}; faults: {soak.faults or 'none'}")
    print(f"pre-emptions {stats.preemptions}, prompt tokens from the prefix cache {stats.prefix_cache_hits}")
    print(f"memory at each tenth of the way, MB: {memory}")
    figures = {"requests": soak.num_started, "ends": dict(soak.ends), "faults": len(soak.faults)}
    more = {"preemptions": stats.preemptions, "prefix_hits": stats.prefix_cache_hits, "memory_mb": memory}
    print(json.dumps({**figures, **more}))
    return int(bool(soak.faults) or sum(soak.ends.values()) != soak.num_started)


if __name__ == "__main__":
    raise SystemExit(main())
