from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clip_base.models import zoo
from clip_base.runtime.errors import InputError
from clip_base.storage import remote
from clip_base.weights.fetching import download as downloads
from clip_base.weights.fetching.download import FILES, Published, download
from clip_base.weights.load import find

CONTENT = np.random.default_rng(0).bytes(900_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
FAST = {"timeout": 2.0, "pause": 0.01}  # a busy machine may take a second for what is at once there


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT and misbehaves as `mood` says, a request at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods: list[str] = []
        self.requests: list[str | None] = []
        self.released = threading.Event()

    @property
    def file(self) -> Published:
        return Published(f"http://127.0.0.1:{self.server_address[1]}/{DIGEST}/M.pt", DIGEST, len(CONTENT))


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        mood = self.server.moods.pop(0) if self.server.moods else "well"
        if mood in ("404", "500"):
            self.send_error(int(mood))
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and mood != "no ranges" else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        if mood == "corrupt":
            body = body[:1000] + bytes([body[1000] ^ 1]) + body[1001:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        if mood in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if mood == "stall":
                self.server.released.wait(60)
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".M.pt.lock"}


def test_the_table_lists_the_nine_models_with_their_checksums():
    assert list(FILES) == zoo.available_models()
    for file in FILES.values():
        assert file.url.split("/")[-2] == file.sha256
        assert len(file.sha256) == 64
        assert file.size > 200_000_000
    assert len({file.sha256 for file in FILES.values()}) == 9


def test_a_file_arrives_whole_and_is_not_fetched_twice(server: Server, tmp_path: Path):
    for _ in range(2):
        path = download(server.file, tmp_path / "cache", **FAST)
        assert path.read_bytes() == CONTENT
    assert server.requests == [None]
    assert left(tmp_path / "cache") == {"M.pt"}


@pytest.mark.parametrize("mood", ["cut", "stall"])
def test_after_a_cut_or_a_stall_it_goes_on_where_it_was(server: Server, tmp_path: Path, mood: str):
    server.moods = [mood, mood]
    assert download(server.file, tmp_path, **FAST).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=450000-", "bytes=675000-"]
    assert left(tmp_path) == {"M.pt"}


def test_a_killed_download_goes_on_in_the_next_call(server: Server, tmp_path: Path):
    (tmp_path / "M.pt.part").write_bytes(CONTENT[:123_456])
    assert download(server.file, tmp_path, **FAST).read_bytes() == CONTENT
    assert server.requests == ["bytes=123456-"]


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path):
    server.moods = ["cut", "no ranges"]
    assert download(server.file, tmp_path, **FAST).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_wrong_content_is_fetched_once_more_and_never_kept(server: Server, tmp_path: Path):
    server.moods = ["corrupt"]
    assert download(server.file, tmp_path / "a", **FAST).read_bytes() == CONTENT
    server.moods = ["corrupt", "corrupt"]
    with pytest.raises(InputError, match="what arrives has another sha256"):
        download(server.file, tmp_path / "b", **FAST)
    assert left(tmp_path / "b") == set()


def test_a_wrong_beginning_left_by_another_file_is_thrown_away(server: Server, tmp_path: Path):
    (tmp_path / "M.pt.part").write_bytes(b"x" * (len(CONTENT) + 5))
    assert download(server.file, tmp_path, **FAST).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT) + 5}-", None]


def test_a_wrong_file_in_the_cache_is_replaced_only_by_a_whole_one(server: Server, tmp_path: Path):
    (tmp_path / "M.pt").write_bytes(b"older")
    server.moods = ["404"]
    with pytest.raises(InputError, match="the server answers 404"):
        download(server.file, tmp_path, **FAST)
    assert (tmp_path / "M.pt").read_bytes() == b"older"
    assert download(server.file, tmp_path, **FAST).read_bytes() == CONTENT


def test_a_server_that_keeps_failing_is_given_up_and_what_arrived_is_kept(server: Server, tmp_path: Path):
    server.moods = ["cut", *["500"] * 10]
    with pytest.raises(InputError, match="the server answers 500"):
        download(server.file, tmp_path, **FAST)
    assert (tmp_path / "M.pt.part").read_bytes() == CONTENT[:450_000]
    assert len(server.requests) == 5


def test_offline_it_says_where_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "models"))
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setitem(FILES, "RN50", Published(f"http://127.0.0.1:9/{DIGEST}/RN50.pt", DIGEST))
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    with pytest.raises(InputError) as raised:
        find("RN50")
    for part in (
        f"put it at {tmp_path / 'models' / 'RN50.pt'}",
        DIGEST,
        "CLIP_BASE_CACHE",
        "cannot be reached",
    ):
        assert part in str(raised.value)


def test_a_file_put_into_the_cache_by_hand_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path))
    monkeypatch.setitem(FILES, "ViT-B/32", Published(f"http://127.0.0.1:9/{DIGEST}/ViT-B-32.pt", DIGEST))
    (tmp_path / "ViT-B-32.pt").write_bytes(CONTENT)
    assert find("ViT-B/32") == tmp_path / "ViT-B-32.pt"
    with pytest.raises(InputError, match="did you mean 'RN50'"):
        downloads.fetch("rn50")


def test_processes_that_want_the_same_file_fetch_it_once(server: Server, tmp_path: Path):
    server.moods = ["stall"]
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(download(server.file, tmp_path, **FAST).read_bytes()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 3
    assert len(server.requests) == 2
