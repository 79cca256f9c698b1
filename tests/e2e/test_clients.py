"""Clients as processes against the real server: those that this environment has.

The others are driven by `scripts/test-clients`, each in an environment of its own.
"""

import re
import sys
from pathlib import Path

import pytest

from tests.clients.catalogue import CLIENTS, ROOT, Client, run_checks, version_of
from tests.e2e.conftest import ServerProcess


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.package)
def test_a_client_and_the_server_go_together(
    client: Client, server: ServerProcess, checkpoint: Path, tmp_path: Path
) -> None:
    if version_of(client) is None:
        pytest.skip("not in this environment: scripts/test-clients makes one")
    outcomes = run_checks(client, sys.executable, server.url, checkpoint, tmp_path)
    assert outcomes
    assert not [outcome.shows for outcome in outcomes if outcome.problem], outcomes


def test_a_client_that_finds_a_fault_is_told(server: ServerProcess, checkpoint: Path, tmp_path: Path) -> None:
    """Nothing above can pass by a client that was never driven."""
    nobody = Client("no-such-client", (), "", "")
    (outcome,) = run_checks(nobody, sys.executable, server.url, checkpoint, tmp_path)
    assert "No module named 'tests.clients.with_no_such_client'" in outcome.problem


def test_every_client_has_its_line_in_the_docs() -> None:
    """That of the script, but for the version: it may have been another one."""
    text = (ROOT / "docs" / "clients.md").read_text()
    for client in CLIENTS:
        begin = rf"\| `{client.package}` \| [\d.]+ \| {re.escape(client.speaks)} \|"
        end = rf"\| {re.escape(client.cannot)} \|"
        assert re.search(f"^{begin}.*{end}$", text, re.MULTILINE), client.package
