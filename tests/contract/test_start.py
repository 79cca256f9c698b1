"""What those who start a server see: addresses that can't be had, a model that loads, what is unsafe."""

import logging
import resource
import socket

import pytest

from cli.main import main
from model.protocol import EngineHealth
from server.announcer import SECONDS_BETWEEN_LINES, Announcer
from server.listening import MOST_CONNECTIONS, OWN_FILES, bound, open_connections, url_of
from server.settings import Settings, SettingsError
from tests.loose import Field

LOADING = EngineHealth(state="loading", reason="reading the weights")
READY = EngineHealth(state="ready")


class Said:
    """An announcer whose clock stands still, and its lines."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="server.announcer")
        self._caplog = caplog
        self.now = 100.0
        self.announcer = Announcer("raven", "http://127.0.0.1:8000", clock=lambda: self.now)

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records]

    def tick(self, health: EngineHealth, seconds: float = 0.0) -> None:
        self.now += seconds
        self.announcer.tick(health)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    return Said(caplog)


def test_the_address_is_named_when_the_model_is_served_and_not_before(said: Said) -> None:
    for _ in range(10):
        said.tick(LOADING, 0.1)
    assert said.lines == ["loading raven"]
    said.tick(READY, 1)
    said.tick(READY, 1)
    assert said.lines[1:] == ["raven is served at http://127.0.0.1:8000 (after 1.9 s)"]


def test_a_long_start_says_now_and_then_what_it_does(said: Said) -> None:
    for _ in range(50):
        said.tick(LOADING, SECONDS_BETWEEN_LINES / 10)
    assert 5 <= len(said.lines) <= 6
    assert all("reading the weights" in line for line in said.lines[1:])
    said.tick(EngineHealth(state="loading", reason="measuring"))
    assert "measuring" in said.lines[-1]


def test_a_restart_is_announced_again(said: Said) -> None:
    for health in (LOADING, READY, LOADING, READY):
        said.tick(health)
    assert [line.split()[0] for line in said.lines] == ["loading", "raven", "loading", "raven"]


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "llm.example"}, True),
        ({"host": "0.0.0.0", "api_keys": "k"}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
    ],
)
def test_an_open_server_that_others_reach_is_warned_of(
    said: Said, options: dict[str, Field], warned: bool
) -> None:
    said.announcer.warn(Settings(**options))
    assert any("no API key" in line for line in said.lines) == warned


def test_a_port_in_use_is_one_line_and_status_2_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--port {port}" in error
    assert "another program" in error


@pytest.mark.parametrize("host", ["192.0.2.1", "a" * 70 + ".example"])
def test_an_address_that_is_not_ours_names_the_option(host: str) -> None:
    with pytest.raises(SettingsError, match="--host"), bound(host, 0):
        pass


def test_every_address_of_a_name_listens_on_one_port() -> None:
    with bound("localhost", 0) as sockets:
        assert len({listening.getsockname()[1] for listening in sockets}) == 1
        with socket.create_connection(("127.0.0.1", sockets[0].getsockname()[1])):
            pass


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("localhost", "localhost"), ("::1", "[::1]")],
)
def test_the_address_that_is_named_is_one_that_a_browser_takes(host: str, shown: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert url_of(Settings(host=host), listening) == f"http://{shown}:{port}"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The limit of open files, as if it were (256, 1000)."""
    limits = [(256, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    return limits


def test_connections_leave_descriptors_for_the_server(files: list[tuple[int, int]]) -> None:
    assert 0 < open_connections(None) <= 256 - OWN_FILES
    files[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert open_connections(None) == MOST_CONNECTIONS


def test_more_connections_raise_the_limit_as_far_as_it_goes(files: list[tuple[int, int]]) -> None:
    assert open_connections(800) == 800
    assert files[-1][0] >= 800 + OWN_FILES
    assert files[-1][1] == 1000
    with pytest.raises(SettingsError, match=r"--max-connections 990.*1000"):
        open_connections(990)
