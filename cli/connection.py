"""A server to talk to: one that runs already, or one of our own that ends with the command.

Our own listens on a free port of this machine and asks for a key that is made for it alone, so that nobody
else's requests reach it. Invariant: what a user can mend is one `UsageError` of one line.
"""

import argparse
import json
import os
import secrets
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from server.command import UsageError, add_settings, local_model, read_settings
from server.listening import bound, url_of
from server.logs import configure_logging
from server.settings import Settings

KEY_VARIABLE = "OPENAI_API_KEY"  # that other clients read as well
CONNECT_SECONDS = 10.0
TICK_SECONDS = 0.05
# Of a server with several models, or of one that others use.
MODEL_CHOICES = ("model_dir", "max_loaded", "unload_idle", "served_model_name")


class AnswerError(Exception):
    """The server has refused a request, or its answer broke off; the message is one line."""


class Connection:
    """A server, the model that is asked there, and a client for both."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client = client
        self.model = model

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed answer as they come; raises AnswerError.

        Closing the iterator ends the request, and what the server does for it.
        """
        asked = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        try:
            with self._client.stream("POST", path, json=asked) as response:
                if response.status_code != 200:
                    response.read()
                    raise AnswerError(_told(response.text, response.status_code))
                for line in response.iter_lines():
                    field, _, value = line.partition(":")
                    if field == "data" and value.strip() != "[DONE]":  # not all put a space before it
                        yield _chunk(value)
        except httpx.HTTPError as error:
            raise AnswerError(f"the connection broke off: {type(error).__name__}") from None


def _chunk(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise AnswerError("the server sent what is no chunk of an answer")
    if "error" in chunk:
        raise AnswerError(_told(json.dumps(chunk), 200))
    return chunk


def _told(text: str, status: int) -> str:
    """What an answer says of an error, in one line."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answers with status {status}"
    return " ".join(str(message).split())


@contextmanager
def connected(model: str | None, url: str | None) -> Iterator[Connection]:
    """The server at `url`, or without one a server of our own for `model`, a folder or a Hugging Face id.

    At `url` the model is a name; None is the first one there.
    """
    if url is None:
        with _own_server(model) as (client, name):
            yield Connection(client, name)
        return
    with _client(url, os.environ.get(KEY_VARIABLE)) as client:
        yield Connection(client, model or _first_model(client, url))


def _client(url: str, key: str | None, *, may_use_proxy: bool = True) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    # Between two tokens there may be any time: the server sends comments, but other servers don't.
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    base = url.rstrip("/").removesuffix("/v1")
    try:
        return httpx.Client(base_url=base, headers=headers, timeout=timeout, trust_env=may_use_proxy)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise UsageError(f"--url {url}: {error}") from None


def _first_model(client: httpx.Client, url: str) -> str:
    try:
        response = client.get("/v1/models", timeout=CONNECT_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(f"no server answers at {url}: {error}") from None
    if response.status_code != 200:
        raise UsageError(f"{url}: {_told(response.text, response.status_code)}")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"{url} lists no models; --model names one") from None


@contextmanager
def _own_server(model: str | None) -> Iterator[tuple[httpx.Client, str]]:
    """A client of a server in this process, and the name of its model."""
    # Here, since a client of a server that runs already needs no web framework, which takes 1.2 s.
    from server.serve import engine_server  # noqa: PLC0415

    key = secrets.token_urlsafe()
    settings = local_model(_own_settings(model, key))
    configure_logging(settings)
    with bound(settings.host, settings.port) as sockets:
        url = url_of(settings, sockets[0])
        server = engine_server([settings], url)
        thread = threading.Thread(target=server.run, args=(sockets,), name="server", daemon=True)
        thread.start()
        try:
            with _client(url, key, may_use_proxy=False) as client:
                _wait_until_ready(client, thread)
                yield client, settings.model_names[0]
        finally:
            server.should_exit = True
            thread.join()


def _own_settings(model: str | None, key: str) -> Settings:
    """Those of the environment for model and engine; what is of the network is ours."""
    parser = argparse.ArgumentParser()
    add_settings(parser)
    settings = read_settings(parser.parse_args([] if model is None else ["--model", model]))
    ours = {
        name: field.get_default() for name, field in Settings.model_fields.items() if _is_of_network(name)
    }
    ours |= {"port": 0, "api_keys": [key], "log_level": "error", "access_log": "off", "shutdown_timeout": 0.0}
    return settings.model_copy(update=ours)


def _is_of_network(name: str) -> bool:
    extra = Settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra["group"] in ("network", "TLS", "access", "limits") or name in MODEL_CHOICES


def _wait_until_ready(client: httpx.Client, thread: threading.Thread) -> None:
    """Asks as any client would have to: the server lives in the event loop of another thread."""
    while thread.is_alive():
        with suppress(httpx.HTTPError):
            if client.get("/ready", timeout=CONNECT_SECONDS).status_code == 200:
                return
        time.sleep(TICK_SECONDS)
    raise UsageError("the model could not be loaded")  # why, the server has said
