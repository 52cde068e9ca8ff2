"""A server that speaks the file protocol of the Hugging Face hub, for tests: repositories are folders.

It takes uploads from those who show TOKEN: small files in the commit, weights as git-lfs objects before.
"""

from __future__ import annotations

import base64
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

TOKEN, READ_TOKEN = "writes", "reads"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves ROOT/owner/name as repositories; `main` and COMMIT are their only revisions."""

    root: Path
    private: set[str]
    asked: list[str]
    objects: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """Answers without a body."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answers lists of files and files."""
        self._answer(body=True)

    def do_POST(self) -> None:
        """Makes repositories, tells how files are to come, and takes commits."""
        path = urlsplit(self.path).path
        self.asked.append(f"POST {path}")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        parts = path.strip("/").split("/")
        if not self._may_write():
            return
        if path == "/api/repos/create":
            wanted = json.loads(content)
            place = f"{wanted['organization']}/{wanted['name']}"
            self.private.update({place} if wanted.get("visibility") == "private" else ())
            exists = (self.root / place).exists()
            (self.root / place).mkdir(parents=True, exist_ok=True)
            self._send_json({"url": f"{self._address()}/{place}"}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            errors = [] if "---" in json.loads(content)["content"] else [{"message": "no head"}]
            self._send_json({"errors": errors, "warnings": []})
        elif parts[4:5] == ["preupload"]:
            named = [file["path"] for file in json.loads(content)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in named}
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()
            ]
            self._send_json({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self._address()}/lfs/{one['oid']}"}}
            self._send_json({"transfer": "basic", "objects": objects})
        elif parts[4:5] == ["commit"]:
            place = "/".join(parts[2:4])
            for line in content.splitlines():
                self._commit(self.root / place, json.loads(line))
            self._send_json({"commitUrl": f"{self._address()}/{place}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        """Takes a git-lfs object, whose name is its sha256."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(f"PUT {self.path}")
        self.objects[hashlib.sha256(content).hexdigest()] = content
        self._send(200, b"", {})

    def _commit(self, folder: Path, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            (folder / value["path"]).write_bytes(self.objects[value["oid"]])

    def _may_write(self) -> bool:
        shown = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if shown != TOKEN:
            self._refuse(403 if shown == READ_TOKEN else 401, "Forbidden")
        return shown == TOKEN

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _send_json(self, content: Any, code: int = 200) -> None:
        self._send(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

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
            self._send_json(entries)

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
    handler = type(
        "Handler",
        (Hub,),
        {"root": root, "private": set() if private is None else private, "asked": asked, "objects": {}},
    )
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
