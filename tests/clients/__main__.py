"""Every client in an environment of its own against one server: `scripts/test-clients [NAME ...]`.

Environments are made in build/clients, by pip, and kept. Prints the rows of docs/clients.md, and exits with
1 if a check has failed. The server has the tests' small model, whose words are noise: what a grammar or the
API decides is checked, not what a model would say.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.clients.catalogue import CLIENTS, ROOT, Client, Outcome, run_checks, version_of
from tests.e2e.conftest import ServerProcess
from tests.small_checkpoint import write_small_checkpoint

INSTALL_SECONDS = 900


def main() -> None:
    """Installs, serves, drives, tells."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lest the server be left behind
    parser = argparse.ArgumentParser(prog="scripts/test-clients", description=__doc__)
    names = [client.package for client in CLIENTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    asked = parser.parse_args().names
    if unknown := set(asked).difference(names):
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    clients = [client for client in CLIENTS if not asked or client.package in asked]
    pythons = {client: environment_of(client) for client in clients}
    problems = 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_small_checkpoint(Path(folder) / "default")
        with ServerProcess(str(checkpoint), "--tool-template", "generic") as server:
            print(
                "\n| client | version | speaks | what was run | what it can't have |\n|---|---|---|---|---|"
            )
            for client, python in pythons.items():
                own = Path(folder) / client.package
                own.mkdir()
                outcomes = run_checks(client, python, server.url, checkpoint, own)
                print(row(client, version_of(client, python) or "?", outcomes), flush=True)
                problems += tell(client, outcomes)
    sys.exit(1 if problems else 0)


def environment_of(client: Client) -> str:
    """The interpreter of the client's environment, made where it is missing or was made of others."""
    folder = ROOT / "build" / "clients" / client.package
    python, note = str(folder / "bin" / "python"), folder / "made-of"
    requirements = "\n".join(client.requirements)
    if note.is_file() and note.read_text() == requirements:
        return python
    print(f"installing {client.package}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", "--quiet", "--upgrade", *client.requirements]
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS)
    note.write_text(requirements)
    return python


def row(client: Client, version: str, outcomes: Sequence[Outcome]) -> str:
    """The client's line of the table."""
    shown = "; ".join(f"FAILED: {o.shows}" if o.problem else o.shows for o in outcomes)
    return f"| `{client.package}` | {version} | {client.speaks} | {shown} | {client.cannot} |".replace(
        "|  |", "| |"
    )


def tell(client: Client, outcomes: Sequence[Outcome]) -> int:
    """Writes what is wrong; how many checks that are."""
    failed = [outcome for outcome in outcomes if outcome.problem]
    for outcome in failed:
        print(f"{client.package}: {outcome.shows}\n{outcome.problem}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    main()
