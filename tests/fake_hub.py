"""A hub on this machine: the few routes that huggingface_hub asks when it downloads a snapshot.

Repositories are dictionaries from file names to contents. Tests run the real library against it, in a
process of its own with HF_ENDPOINT set, since the library reads its environment when it is imported.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One model: its files, its commit, and who may read it."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    token: str | None = None

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class FakeHub:
    """Serves `repositories` at `url` while it is entered; `asked` lists the files that were fetched."""

    repositories: dict[str, Repository]
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        repository = self.served.repositories.get("/".join(parts[:2]))
        if repository is None or not self._may_read(repository):
            self._error(401, "RepoNotFound")
        elif is_api:
            self._api(repository, parts[2], parts[3])
        else:
            self._file(repository, "/".join(parts[4:]), body=body)

    def _may_read(self, repository: Repository) -> bool:
        return repository.token is None or self.headers.get("authorization") == f"Bearer {repository.token}"

    def _api(self, repository: Repository, what: str, revision: str) -> None:
        if revision not in (*repository.revisions, repository.commit):
            self._error(404, "RevisionNotFound")
        elif what == "tree":
            files = repository.files.items()
            self._json([{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files])
        else:
            self._json({"id": "org/name", "sha": repository.commit, "siblings": []})

    def _file(self, repository: Repository, name: str, *, body: bool) -> None:
        if repository.gated:
            return self._error(403, "GatedRepo")
        content = repository.files[name]
        if body:
            self.served.asked.append(name)
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": repository.commit}
        return self._send(200, content, headers, body=body)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"content-type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
