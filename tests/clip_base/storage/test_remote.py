"""Files at web addresses: a server that cuts, stalls and refuses is asked again, from the byte reached."""

from __future__ import annotations

import http.server
import io
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clip_base.data.webdataset import WebdatasetConfig, stream_records
from clip_base.runtime.errors import InputError
from clip_base.storage import remote, remote_cache
from clip_base.storage.files import existing, read_json
from clip_base.storage.remote import RemoteError, RemoteFile, address_of, open_remote, read_range

CONTENT = np.random.default_rng(1).bytes(600_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` and misbehaves as `moods` say, a request each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods: list[str] = []
        self.requests: list[str | None] = []
        self.content, self.version, self.ranges = CONTENT, '"1"', True
        self.released = threading.Event()

    def at(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        mood = self.server.moods.pop(0) if self.server.moods else "well"
        if mood.isdecimal():
            self.send_error(int(mood))
            return
        content, begin, end = self.server.content, 0, len(self.server.content)
        if asked and self.server.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, end) if last else end
        body = content[begin:end]
        self.send_response(206 if asked and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        if self.server.version:
            self.send_header("ETag", self.server.version)
        if asked and self.server.ranges:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
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
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    remote_cache.fetch.cache_clear()
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        (Path("s3://bucket/a/b.tar"), "s3://bucket/a/b.tar"),
        (Path("https://host/x.json?a=1"), "https://host/x.json?a=1"),
        ("hf://datasets/owner/name/x.tar", "hf://datasets/owner/name/x.tar"),
        ("data/s3.tar", None),
        ("file:///data/x.tar", None),
        ("s3:x", None),
        (Path("/data/s3:/x"), None),
    ],
)
def test_an_address_is_told_from_a_path(given: str | Path, address: str | None) -> None:
    assert address_of(given) == address


@pytest.mark.parametrize("moods", [["cut", "cut"], ["503", "cut"], ["503", "429", "500"]])
def test_a_file_is_read_whole_from_a_bad_server(server: Server, moods: list[str]) -> None:
    server.moods = list(moods)
    with open_remote(server.at("x")) as file:
        assert file.read() == CONTENT
    assert len(server.requests) == len(moods) + 1
    if moods == ["cut", "cut"]:
        assert server.requests == [None, "bytes=300000-", "bytes=450000-"]


def test_a_stall_is_ended_and_the_rest_is_asked_for(server: Server) -> None:
    server.moods = ["stall"]
    with RemoteFile(server.at("x"), timeout=1.0) as file:
        assert b"".join(iter(lambda: file.read(1 << 16), b"")) == CONTENT
    assert server.requests == [None, "bytes=300000-"]


def test_a_server_that_knows_no_parts_sends_all_again_and_no_byte_twice(server: Server) -> None:
    server.moods, server.ranges = ["cut"], False
    with open_remote(server.at("x")) as file:
        assert file.read() == CONTENT
    assert read_range(server.at("x"), 1000, 50) == CONTENT[1000:1050]


def test_a_file_that_changes_while_it_is_read_is_refused(server: Server) -> None:
    server.moods = ["cut"]
    with open_remote(server.at("x")) as file:
        assert file.read(1000) == CONTENT[:1000]
        server.version = '"2"'
        with pytest.raises(RemoteError, match="it changed while it was read"):
            file.read()


def test_a_server_that_stays_bad_is_given_up(server: Server) -> None:
    server.moods = ["503"] * 9
    with pytest.raises(RemoteError, match="the server answers 503"):
        open_remote(server.at("x"))
    assert len(server.requests) == remote.ATTEMPTS


@pytest.mark.parametrize(("mood", "told"), [("404", "answers 404"), ("403", "403 .*needs no login")])
def test_what_will_not_pass_is_told_at_once(server: Server, mood: str, told: str) -> None:
    server.moods = [mood]
    with pytest.raises(RemoteError, match=told):
        open_remote(server.at("x"))
    assert len(server.requests) == 1


def test_parts_are_read_with_one_request_each_and_again_after_faults(server: Server) -> None:
    server.moods = ["503", "cut"]
    assert read_range(server.at("x"), 1000, 500) == CONTENT[1000:1500]
    assert read_range(server.at("x"), len(CONTENT) - 10, 500) == CONTENT[-10:]
    assert server.requests == ["bytes=1000-1499"] * 3 + [f"bytes={len(CONTENT) - 10}-{len(CONTENT) + 489}"]


def test_a_tar_is_read_as_it_arrives_and_can_be_sought_in(server: Server) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for number in range(4):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 100_000
            tar.addfile(member, io.BytesIO(CONTENT[number * 100_000 :]))
    server.content, server.moods = packed.getvalue(), ["cut"]
    with open_remote(server.at("x.tar")) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(found) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert b"".join(found.values()) == CONTENT[:400_000]


def test_a_network_that_fails_is_no_damage_of_a_tar(server: Server) -> None:
    """Else a unit of mining would end early and count as done."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for number in range(4):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 100_000
            tar.addfile(member, io.BytesIO(CONTENT[number * 100_000 :]))
    server.content, server.moods = packed.getvalue(), ["cut", *["503"] * 9]
    records = stream_records(server.at("x.tar"), WebdatasetConfig(shards="x"))
    assert next(records).key == "0"
    with pytest.raises(RemoteError, match="answers 503"):
        list(records)


def test_a_copy_is_kept_until_the_file_changes(server: Server) -> None:
    server.content = b'{"a": 1}'
    assert read_json(server.at("x.json?token=1")) == {"a": 1}
    first = existing(server.at("x.json?token=1"))
    assert first.name == "x.json"
    remote_cache.fetch.cache_clear()  # as another process
    assert existing(server.at("x.json?token=1")) == first
    server.content, server.version = b'{"a": 2}', '"2"'
    remote_cache.fetch.cache_clear()
    assert read_json(server.at("x.json?token=1")) == {"a": 2}
    assert first.read_text() == '{"a": 1}'  # whoever reads it still can


def test_without_a_version_a_file_is_fetched_anew(server: Server) -> None:
    server.content, server.version = b"old", ""
    assert existing(server.at("x.txt")).read_text() == "old"
    server.content = b"new"
    remote_cache.fetch.cache_clear()
    assert existing(server.at("x.txt")).read_text() == "new"


def test_a_killed_copy_goes_on_where_it_was(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SKIP", 100_000)
    path = existing(server.at("x.bin"))
    path.with_name(".x.bin.part").write_bytes(CONTENT[:123_456])
    path.unlink()
    remote_cache.fetch.cache_clear()
    server.requests.clear()
    assert existing(server.at("x.bin")).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=123456-"]


def test_an_error_comes_through_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(RemoteError("s3://a/b", "it is gone", absent=True)))
    assert (str(error), error.reason, error.absent) == (
        "s3://a/b cannot be used: it is gone",
        "it is gone",
        True,
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"needs the package gcsfs.*pip install 'regionclip\[remote\]'"):
        existing("gs://bucket/x.json")
    with pytest.raises(InputError, match="a web server lists no folders"):
        remote_cache.listing("https://127.0.0.1:9/folder")
