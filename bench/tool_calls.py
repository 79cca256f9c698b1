"""Calls of tools under load: whether all that `required` gives parse and match, with and without speculation.

    python -m bench.tool_calls --output bench/results/tool_calls.txt

Starts a server with the given model (default: the embedded one), which needs no sense of tools: a grammar
makes the calls. Each request has its own question, seed and temperature. Fails if a call does not parse or
match its schema, or differs without speculation.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from bench.options import Extra, output_file, positive, reporting
from bench.server_process import ServerProcess

jsonschema_rs: Any = Extra("jsonschema_rs")

Json = dict[str, Any]
ROW_BUDGET = 64  # rows of a pass: speculation must not depend on how busy the machine is
ANSWER_SECONDS = 300  # an answer on a machine that has much else to do
CITY = {"type": "string", "minLength": 1, "maxLength": 12}
FUNCTIONS: dict[str, Json] = {
    "get_weather": {"city": CITY, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "add": {name: {"type": "integer", "minimum": -999, "maximum": 999} for name in ("a", "b")},
    "send_mail": {
        "to": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z]{1,6}@[a-z]{1,6}\\.org$"},
            "maxItems": 3,
        },
        "subject": {"type": "string", "maxLength": 20},
        "urgent": {"type": "boolean"},
    },
    "book": {
        "trip": {
            "type": "object",
            "properties": {
                "from": CITY,
                "to": CITY,
                "seats": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["from", "to", "seats"],
            "additionalProperties": False,
        },
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 12}]},
    },
    "stop": {},
}
QUESTIONS = (
    "What is the weather in Oslo?",
    "Add 17 and 4.",
    "Tell Ann that I am late.",
    "I want to go to Rome.",
)


class Outcome(NamedTuple):
    """What one answer came to: its calls as text, how many, what it took, what is wrong with them."""

    calls: str
    num_calls: int
    num_tokens: int
    num_drafts: int  # that the full depth confirmed
    problem: str
    is_cut: bool  # by the end of the context: nothing is promised of its last call


def tools() -> list[Json]:
    """All functions in OpenAI's shape."""
    return [
        {"type": "function", "function": {"name": name, "parameters": schema_of(name)}} for name in FUNCTIONS
    ]


def schema_of(name: str) -> Json:
    """The schema of a function's arguments; all of them are required."""
    properties = FUNCTIONS[name]
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def body_of(number: int, *, speculation: bool) -> Json:
    """The request `number`: every tenth one allows several calls, every fifth one names its function."""
    names = list(FUNCTIONS)
    named = {"type": "function", "function": {"name": names[number // 5 % len(names)]}}
    return {
        "model": "default",
        "messages": [{"role": "user", "content": f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"}],
        "tools": tools(),
        "tool_choice": named if number % 5 == 0 else "required",
        "parallel_tool_calls": number % 10 == 1,
        "temperature": (0, 0.7, 1.0)[number % 3],
        "seed": number,
        "speculation": speculation,
    }


def judged(answer: Json) -> Outcome:
    """What an answer came to."""
    (choice,) = answer["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    text = json.dumps([choice["message"]["content"], calls], ensure_ascii=False)
    reason = choice["finish_reason"]
    is_cut = reason == "length"
    problem = "" if is_cut or reason == "tool_calls" else f"finish reason {reason}"
    for call in calls[: len(calls) - is_cut]:
        try:
            jsonschema_rs.validate(schema_of(call["name"]), json.loads(call["arguments"]))
        except (ValueError, KeyError) as error:  # of the schema or of JSON
            problem = f"{call}: {error}; finish reason {reason}"
    usage = answer["usage"]
    num_drafts = usage["completion_tokens_details"]["accepted_prediction_tokens"]
    return Outcome(text, len(calls), usage["completion_tokens"], num_drafts, problem, is_cut)


def run(server: ServerProcess, args: argparse.Namespace, *, speculation: bool) -> tuple[list[Outcome], float]:
    """The outcomes of all requests, `concurrency` of which run at a time, and the seconds that they took."""

    def ask(number: int) -> Outcome:
        body = body_of(number, speculation=speculation)
        return judged(json.loads(server.post("/v1/chat/completions", body, timeout=ANSWER_SECONDS)))

    begin = time.perf_counter()
    with ThreadPoolExecutor(args.concurrency) as threads:
        outcomes = list(threads.map(ask, range(args.first, args.first + args.requests)))
    return outcomes, time.perf_counter() - begin


def report(args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Lines that say what was found, and for each whether it is as it should be."""
    flags = [] if args.model is None else [args.model, "--served-model-name", "default"]
    flags += ["--tool-template", "generic", "--row-budget", str(ROW_BUDGET)]
    with ServerProcess(*flags) as server:
        size = f"{args.requests} requests with a call required, {args.concurrency} at once"
        size += f", from number {args.first} on" if args.first else ""
        yield f"{size}, {os.cpu_count()} cores", True
        found = {}
        for on in (True, False):
            found[on], seconds = run(server, args, speculation=on)
            yield from told(found[on], seconds, speculation=on)
    differing = sum(on.calls != off.calls for on, off in zip(found[True], found[False], strict=True))
    yield f"{differing} answers differ with and without speculation", not differing


def told(outcomes: list[Outcome], seconds: float, *, speculation: bool) -> Iterator[tuple[str, bool]]:
    """The lines about one run."""
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    num_calls = sum(outcome.num_calls for outcome in outcomes)
    num_tokens = sum(outcome.num_tokens for outcome in outcomes)
    num_drafts = sum(outcome.num_drafts for outcome in outcomes)
    num_cut = sum(outcome.is_cut for outcome in outcomes)
    counts = f"{num_calls} calls, {len(problems)} that do not parse or match, {num_cut} cut by the context"
    work = f"{num_tokens} tokens, {num_drafts} of them drafts that held, in {seconds:.1f} s"
    is_good = not problems and (num_drafts > 0) == speculation
    yield f"speculation {'on' if speculation else 'off'}: {counts}, {work}", is_good
    yield from ((f"  {problem}", False) for problem in problems[:5])


@reporting("python -m bench.tool_calls")
def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.tool_calls", description=__doc__)
    parser.add_argument("--model", default=None, help="default: the embedded one")
    parser.add_argument("--requests", type=positive, default=200)
    parser.add_argument(
        "--first", type=positive, default=0, help="number of the first request, for a run in parts"
    )
    parser.add_argument("--concurrency", type=positive, default=16)
    parser.add_argument("--output", type=output_file, default=None, help="file for what is printed")
    args = parser.parse_args()
    lines, is_good = [], True
    for line, as_it_should_be in report(args):
        print(line, flush=True)
        lines.append(line)
        is_good = is_good and as_it_should_be
    if args.output is not None:
        args.output.write_text("".join(f"{line}\n" for line in lines))
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
