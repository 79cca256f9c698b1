"""`speed bench serve URL`: load on a running server, and how long its users wait.

Requests arrive by chance, `--request-rate` a second on average (a Poisson process, whether or not earlier
ones have ended), or all at once with at most `--max-concurrency` in flight. Measured are time to the first
token (TTFT), time for each token after it (TPOT), time between pieces of a stream (ITL, of one token or
several), time to the end (E2EL), and goodput: requests a second that keep to all of `--goodput`. The JSON
object has the keys of `vllm bench serve`. Works with every server that speaks OpenAI's API; the load comes
from this process, so give it a core of its own where figures of the server's limit are wanted.
"""

import argparse
import asyncio
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from bench.load_client import PATHS, Answer, Json, LoadError, answer, connect, first_model, load
from bench.load_report import Limit, details, plot, summary, table
from bench.options import count, output_file, plot_file, positive, reporting
from bench.questions import QUESTIONS

KEY_VARIABLE = "OPENAI_API_KEY"
LIMITED = ("ttft", "tpot", "e2el")  # what a goal of goodput can be about


def limit(text: str) -> Limit:
    """The type of `--goodput`: METRIC:MILLISECONDS."""
    name, _, number = text.partition(":")
    try:
        milliseconds = float(number)
    except ValueError:
        milliseconds = math.nan
    if name not in LIMITED or not milliseconds > 0:
        metrics = ", ".join(LIMITED)
        raise argparse.ArgumentTypeError(
            f"{text!r} is not METRIC:MILLISECONDS with a metric of {metrics} and a number above 0"
        )
    return Limit(name, milliseconds)


def rate(text: str) -> float:
    """The type of `--request-rate`: requests a second, or inf."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, or inf")
    return value


def percentiles(text: str) -> list[float]:
    """The type of `--percentiles`: numbers from 0 to 100 with commas between them."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 0 to 100")
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `speed bench serve` on a parser."""
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", help="default: the first that /v1/models tells")
    parser.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), help=f"default: {KEY_VARIABLE}")
    parser.add_argument("--endpoint", choices=["chat", "completions"], default="chat")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a file: one prompt a line, or a JSON object a line (default: 20 questions)",
    )
    parser.add_argument("--num-prompts", type=positive, default=100, help="requests in all")
    parser.add_argument(
        "--request-rate", type=rate, default=math.inf, help="arrivals a second (default: inf)"
    )
    parser.add_argument(
        "--max-concurrency", type=positive, help="most requests in flight (default: no limit)"
    )
    parser.add_argument("--max-tokens", type=positive, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ignore-eos", action="store_true", help="every answer has --max-tokens tokens")
    parser.add_argument(
        "--extra-body", type=_object, default={}, help="a JSON object: more fields of requests"
    )
    parser.add_argument("--goodput", type=limit, nargs="+", default=[], metavar="METRIC:MS")
    parser.add_argument("--percentiles", type=percentiles, default="50,90,99", help="default: %(default)s")
    parser.add_argument("--timeout", type=positive, default=600, help="seconds without a byte")
    parser.add_argument("--warmups", type=count, default=1, help="requests before the measured ones")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--plot", type=plot_file, help="an .svg file to write")
    parser.add_argument("--result", type=output_file, help="a .json file: the summary and every request")


@reporting("speed bench serve")
def run(args: argparse.Namespace) -> int:
    """Runs `speed bench serve`; the last line printed is one JSON object."""
    bodies = list(_bodies(args))
    model, answers, duration = asyncio.run(_load(args, bodies))
    chosen = {
        "endpoint_type": args.endpoint,
        "model_id": model,
        "num_prompts": args.num_prompts,
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "max_concurrency": args.max_concurrency,
    }
    figures = chosen | summary(answers, duration, args.goodput, args.percentiles)
    print(table(figures, args.percentiles))
    for error in sorted({each.error for each in answers if each.error})[:5]:
        print(f"failed: {error}")
    if args.plot:
        plot(answers, args.plot)
    if args.result:
        args.result.write_text(json.dumps(figures | details(answers)) + "\n")
    print(json.dumps(figures))
    return 0 if any(not each.error for each in answers) else 1


def _object(text: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _bodies(args: argparse.Namespace) -> Iterator[Json]:
    """The bodies of all requests, without the model; prompts begin anew when a file has too few."""
    prompts: list[Json] = [{"prompt": question} for question in QUESTIONS]
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    for index in range(args.num_prompts):
        given = dict(prompts[index % len(prompts)])
        if args.endpoint == "chat" and "messages" not in given:
            given = {"messages": [{"role": "user", "content": given.pop("prompt")}], **given}
        elif args.endpoint == "completions" and "prompt" not in given:
            raise ValueError(
                f"{args.prompts}: a line has messages, which --endpoint completions does not take"
            )
        ending = {"ignore_eos": True} if args.ignore_eos else {}
        yield {
            "max_tokens": args.max_tokens,
            "temperature": args.temperature,
            **ending,
            **args.extra_body,
            **given,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def read_prompts(file: Path) -> list[Json]:
    """The prompts of a file: a text a line, or a JSON object a line that has `prompt` or `messages`.

    Further fields of an object, such as `max_tokens`, go into its request. Raises OSError, or ValueError with
    the number of the line.
    """
    prompts: list[Json] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if not line.startswith("{"):
            prompts.append({"prompt": line})
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        if not fields.keys() & {"prompt", "messages"}:
            raise ValueError(f"{file}, line {number}: an object needs `prompt` or `messages`")
        prompts.append(fields)
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


async def _load(args: argparse.Namespace, bodies: list[Json]) -> tuple[str, list[Answer], float]:
    """The model, all answers in the order of their requests, and the seconds that they took in all."""
    path = PATHS[args.endpoint]
    async with connect(args.url, args.api_key, args.timeout) as client:
        model = args.model or await first_model(client)
        named = [{"model": model, **body} for body in bodies]
        for body in named[: args.warmups]:
            warm = await answer(client, path, body, time.perf_counter())
            if warm.error:
                raise LoadError(f"{args.url} does not answer the warm-up: {warm.error}")
        times = arrivals(len(bodies), args.request_rate, args.seed)
        return model, *await load(client, path, named, times, args.max_concurrency)


def arrivals(number: int, per_second: float, seed: int) -> list[float]:
    """Times in seconds at which requests arrive: a Poisson process, or all at 0 for an infinite rate."""
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(number):
        times.append(now)
        now += 0.0 if math.isinf(per_second) else rng.expovariate(per_second)
    return times
