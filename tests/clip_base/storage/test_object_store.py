"""Files in an object store: moto's server speaks S3 here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_base.data.webdataset import WebdatasetConfig, WebdatasetSource, stream_records
from clip_base.runtime.errors import InputError
from clip_base.storage import remote, remote_cache
from clip_base.storage.files import beside, existing, read_json, read_text
from clip_base.storage.hashing import content_hash
from clip_base.storage.remote import RemoteError, filesystem, open_remote, read_range
from clip_base.storage.tars import addresses
from clip_base.synthetic.scenes import ScenesConfig, generate
from clip_base.weights.load import find
from regionclip.concepts.pool import pool_language

CONTENT = np.random.default_rng(2).bytes(300_000)


@pytest.fixture
def files(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The store's file system; the cache is empty."""
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    remote_cache.fetch.cache_clear()
    found, _ = filesystem(store)
    return found


def test_files_are_read_and_copied(files: Any, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 70_000)  # five requests
    files.pipe_file("bucket/a/x.bin", CONTENT)
    files.pipe_file("bucket/a/x.json", b'[1, "two"]')
    with open_remote(f"{store}/a/x.bin") as file:
        assert file.read() == CONTENT
    assert read_range(f"{store}/a/x.bin", 1000, 50) == CONTENT[1000:1050]
    assert existing(Path(f"{store}/a/x.bin")).read_bytes() == CONTENT
    assert read_json(f"{store}/a/x.json") == [1, "two"]


def test_weights_are_found_at_an_address(files: Any, store: str) -> None:
    files.pipe_file("bucket/w.safetensors", CONTENT)
    assert find(f"{store}/w.safetensors").read_bytes() == CONTENT


def test_folders_are_listed_and_copied(files: Any, store: str) -> None:
    for name in ("w/one.txt", "w/below/two.txt", "w/10.tar"):
        files.pipe_file(f"bucket/{name}", name.encode())
    assert remote_cache.listing(f"{store}/w", ".tar") == [f"{store}/w/10.tar"]
    assert remote_cache.listing(f"{store}/w/*.txt") == [f"{store}/w/one.txt"]
    folder = existing(f"{store}/w")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "one.txt",
        "10.tar",
        "below/two.txt",
    }
    assert read_text(folder / "below" / "two.txt") == "w/below/two.txt"
    before = content_hash(f"{store}/w")
    files.pipe_file("bucket/w/one.txt", b"one again")
    remote_cache.fetch.cache_clear()
    assert content_hash(f"{store}/w") != before


def test_what_stands_beside_a_file_is_found(files: Any, store: str) -> None:
    files.pipe_file("bucket/pool.jsonl", b"")
    files.pipe_file("bucket/pool.jsonl.meta.json", b'{"options": {"language": "zh"}}')
    assert pool_language(f"{store}/pool.jsonl") == "zh"
    assert beside(f"{store}/pool.jsonl", ".phrases.db") is None
    with pytest.raises(RemoteError, match="cannot be reached"):
        beside("http://127.0.0.1:9/pool.jsonl", ".meta.json")


def test_records_of_tars_are_those_of_local_ones(files: Any, store: str, tmp_path: Path) -> None:
    scenes = {"images": 6, "val_images": 2, "size": 64, "object_min": 0.3, "workers": 1, "seed": 3}
    generate(ScenesConfig(out=str(tmp_path / "w"), format="webdataset", tar_images=4, **scenes))
    names = [path.name for path in sorted((tmp_path / "w").glob("train-*.tar"))]
    assert len(names) == 2
    for name in names:
        files.put_file(str(tmp_path / "w" / name), f"bucket/tars/{name}")
    files.pipe_file("bucket/tars/notes.txt", b"")
    assert addresses(f"{store}/tars") == [f"{store}/tars/{name}" for name in names]
    assert addresses(f"{store}/tars/*1.tar") == [f"{store}/tars/{names[1]}"]
    here = WebdatasetConfig(shards=str(tmp_path / "w" / "train-{0000..0001}.tar"))
    there = WebdatasetConfig(shards=f"{store}/tars/train-{{0000..0001}}.tar", index=str(tmp_path / "index"))
    wanted = WebdatasetSource(here).pairs()
    for _ in range(2):  # the second time by the kept index
        found = WebdatasetSource(there).pairs()
        assert len(found) == len(wanted) == 6
        for number in range(6):
            assert found[number].captions == wanted[number].captions
            assert found[number].image.read_bytes() == wanted[number].image.read_bytes()
    assert len(list((tmp_path / "index").iterdir())) == 2
    streamed = [record for tar in addresses(f"{store}/tars") for record in stream_records(tar, there)]
    assert [record.captions for record in streamed] == [wanted[number].captions for number in range(6)]
    with pytest.raises(InputError, match="holds no tars"):
        addresses(f"{store}/nothing")
    with pytest.raises(InputError, match="cannot be read; give a path, or s3://"):
        addresses("pipe:cat x.tar")


def test_a_folder_of_too_many_files_is_refused(
    files: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_cache, "MOST_FILES", 1)
    for name in "ab":
        files.pipe_file(f"bucket/many/{name}.jpg", b"")
    with pytest.raises(RemoteError, match=r"images folder 'many' has 2 files.*pack images into webdataset"):
        existing(f"{store}/many", "images folder")


def test_what_is_not_there_is_told_at_once(files: Any, store: str) -> None:
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"s3://bucket/none\.json cannot be used: there is no such file"):
        existing(f"{store}/none.json")
    with pytest.raises(RemoteError, match="there is no such"):
        open_remote("s3://another-bucket/x.tar")
    assert time.monotonic() - began < 20  # it is not asked for again and again


def test_missing_credentials_are_told(files: Any, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.pipe_file("bucket/x.json", b"{}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    kind = type(files)
    monkeypatch.setattr(kind, "_cache", {})
    with pytest.raises(RemoteError, match="credentials are missing: set AWS_ACCESS_KEY_ID"):
        existing(f"{store}/x.json")
