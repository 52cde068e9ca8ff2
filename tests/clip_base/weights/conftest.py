"""A server that speaks the file protocol of the Hugging Face hub, for tests: repositories are folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves ROOT/owner/name as repositories; `main` and COMMIT are their only revisions."""

    root: Path
    private: set[str]
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """Answers without a body."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answers lists of files and files."""
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        self.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._list("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif "resolve" in parts:
            place = parts.index("resolve")
            self._file("/".join(parts[:place]), parts[place + 1], "/".join(parts[place + 2 :]), body)
        else:
            self._refuse(404, "EntryNotFound")

    def _known(self, repository: str, revision: str) -> bool:
        if repository in self.private:
            self._refuse(403, "GatedRepo")
        elif not (self.root / repository).is_dir():
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _list(self, repository: str, revision: str) -> None:
        if self._known(repository, revision):
            folder = self.root / repository
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            entries = [
                {
                    "type": "file",
                    "path": str(path.relative_to(folder)),
                    "size": path.stat().st_size,
                    "oid": "0",
                }
                for path in files
            ]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: str, revision: str, name: str, body: bool) -> None:
        if not self._known(repository, revision):
            return
        path = self.root / repository / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data = path.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._send(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT}, body)

    def _refuse(self, code: int, reason: str) -> None:
        self._send(code, b"{}", {"X-Error-Code": reason, "X-Error-Message": reason}, self.command != "HEAD")

    def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serving(root: Path, private: set[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yields the server's address, and the list of what was asked."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"root": root, "private": private or set(), "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def hub_server() -> Callable[..., AbstractContextManager[tuple[str, list[str]]]]:
    """The function `serving`: a context with a server of repositories."""
    return serving
