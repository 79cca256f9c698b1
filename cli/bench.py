"""`speed bench`: measures a model, or a server that runs."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.arguments import fill
from cli.checkout import need

if TYPE_CHECKING:
    from cli.arguments import Commands


def add_to(commands: "Commands", given: Sequence[str]) -> None:
    """Adds the command with its benchmarks; `given` is the command line."""
    parser = commands.add_parser("bench", help="measure")
    benchmarks = parser.add_subparsers(metavar="benchmark", required=True)
    for name, text, add_arguments in (
        ("latency", "passes and time per token, with and without speculation", _add_latency),
        ("throughput", "tokens/s over the number of requests at once", _add_throughput),
        ("serve", "load on a running server: how long its users wait", _add_load),
    ):
        fill(benchmarks.add_parser(name, help=text), ["bench", name], given, add_arguments)


def _add_latency(parser: argparse.ArgumentParser) -> None:
    need("bench")
    from bench import latency  # noqa: PLC0415

    latency.add_arguments(parser)
    parser.set_defaults(run=latency.run)


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    need("bench")
    from bench import throughput  # noqa: PLC0415

    throughput.add_arguments(parser)
    parser.set_defaults(run=throughput.run)


def _add_load(parser: argparse.ArgumentParser) -> None:
    need("bench")
    from bench import serve  # noqa: PLC0415

    serve.add_arguments(parser)
    parser.set_defaults(run=serve.run)
