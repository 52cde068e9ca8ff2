"""Every reader of text files: byte order marks are dropped, other encodings are named, none is guessed.

Covered: captions in COCO's JSON (both packages), JSON lists, JSON Lines, CSV, TSV and plain text; image-text
pairs from CSV, JSON Lines, folders and tars; class lists, class names, prompt templates, stop words, concept
pools, splits, annotations and results in JSON; config files.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.data.coco import read_captions, read_instances
from clip_base.data.sources import SOURCES
from clip_base.evaluation.prompts import read_templates
from clip_base.evaluation.zeroshot import ZeroshotConfig, class_names
from clip_base.jobs import config
from clip_base.jobs.config import build_plugin
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_text
from regionclip.concepts.phrases import read_stop_words
from regionclip.concepts.pool import read_concepts
from regionclip.data.caption_index import CaptionIndex, write_caption_index
from regionclip.data.captions import read_texts
from regionclip.data.categories import load_split, parse_names
from regionclip.data.results import read_results

COCO = {
    "images": [{"id": 1, "file_name": "é.jpg"}],
    "annotations": [{"image_id": 1, "category_id": 1, "caption": "a café"}],
    "categories": [],
}


def captions_of(name: str, **options: Any) -> list[str]:
    found = build_plugin(SOURCES, {"name": name, **options}).pairs()
    return [text for index in range(len(found)) for text in found[index].captions]


def listed(path: str) -> list[str]:
    write_caption_index(path, Path(f"{path}.db"))
    images = CaptionIndex(Path(f"{path}.db"))
    return [text for part in images.slices(9) for image in images.read(part) for text in image.captions]


def beside(path: str, **options: str) -> list[str]:
    Path(path).with_suffix(".jpg").touch()
    return captions_of("folder", folder=str(Path(path).parent), **options)


def in_a_tar(path: str, **options: str) -> list[str]:
    shard = Path(path).with_suffix(".tar")
    with tarfile.open(shard, "w") as tar:
        for name, data in (("a.jpg", b""), ("a.txt", Path(path).read_bytes())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return captions_of("webdataset", shards=str(shard), **options)


CONCEPT = json.dumps({"concept": "café", "count": 1, "examples": []}, ensure_ascii=False)
PAIR = json.dumps({"image": "a.jpg", "caption": "a café"}, ensure_ascii=False)
# The file's name, its content, who reads it (path, **encoding), and what comes out. Those in the first list
# take an encoding.
READERS: dict[str, tuple[str, str, Callable[..., Any], Any]] = {
    "csv source": (
        "a.csv",
        "image,caption\na.jpg,a café\n",
        lambda path, **o: captions_of("csv", file=path, **o),
        ["a café"],
    ),
    "jsonl source": ("a.jsonl", PAIR, lambda path, **o: captions_of("jsonl", file=path, **o), ["a café"]),
    "folder source": ("a.txt", "a café\n", beside, ["a café"]),
    "webdataset source": ("a.txt", "a café\n", in_a_tar, ["a café"]),
    "captions in lines": ("a.txt", "a café\n", lambda path, **o: list(read_texts(path, **o)), ["a café"]),
    "captions in jsonl": ("a.jsonl", PAIR, lambda path, **o: list(read_texts(path, **o)), ["a café"]),
    "captions in csv": (
        "a.csv",
        "caption\na café\n",
        lambda path, **o: list(read_texts(path, **o)),
        ["a café"],
    ),
    "captions in tsv": (
        "a.tsv",
        "caption\turl\na café\tx\n",
        lambda path, **o: list(read_texts(path, **o)),
        ["a café"],
    ),
}
UTF8_ONLY: dict[str, tuple[str, str, Callable[..., Any], Any]] = {
    "coco captions": (
        "a.json",
        json.dumps(COCO, ensure_ascii=False),
        lambda path: read_captions(path),
        ({1: ["a café"]}, {1: "é.jpg"}),
    ),
    "captions to mine": ("a.json", json.dumps(COCO, ensure_ascii=False), listed, ["a café"]),
    "captions in json": ("a.json", '["a café"]', lambda path: list(read_texts(path)), ["a café"]),
    "annotations": ("a.json", json.dumps(COCO, ensure_ascii=False), read_instances, COCO),
    "results": ("a.json", '[{"é": 1}]', lambda path: read_results(path, {}, "x"), None),
    "class list": ("a.txt", "café\ndog\n", parse_names, ["café", "dog"]),
    "class list in json": ("a.json", '["café", "dog"]', parse_names, ["café", "dog"]),
    "class names": ("a.txt", "café\ndog\n", lambda path: class_names([path], ["a", "b"]), ["café", "dog"]),
    "templates": ("a.txt", "{} café\n", read_templates, ["{} café"]),
    "stop words": ("a.txt", "café\n", read_stop_words, frozenset({"café"})),
    "concept pool": ("a.jsonl", CONCEPT, lambda path: read_concepts(path)[0].concept, "café"),
    "split": (
        "a.json",
        '{"base": ["café"], "novel": []}',
        lambda path: load_split(path, ["café"]).base,
        ("café",),
    ),
    "config": (
        "a.yaml",
        "images: café\nweights: x\nout: x\n",
        lambda path: config.resolve(ZeroshotConfig, path).images,
        "café",
    ),
}


@pytest.mark.parametrize("reader", READERS | UTF8_ONLY)
def test_a_byte_order_mark_is_dropped(tmp_path: Path, reader: str) -> None:
    name, content, read, found = (READERS | UTF8_ONLY)[reader]
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    if found is None:  # read past its encoding, and refused for what it holds
        with pytest.raises(InputError, match="needs image_id"):
            read(str(tmp_path / name))
    else:
        assert read(str(tmp_path / name)) == found


@pytest.mark.parametrize("reader", READERS | UTF8_ONLY)
def test_another_encoding_is_named_and_never_guessed(tmp_path: Path, reader: str) -> None:
    name, content, read, _ = (READERS | UTF8_ONLY)[reader]
    (tmp_path / name).write_text(content, encoding="cp1252")
    remedy = "or give encoding=cp1252" if reader in READERS else "save it as UTF-8$"
    with pytest.raises(
        InputError, match=rf"{tmp_path}/a.*not UTF-8: byte 0xE9 in line \d+; .* cp1252 .*{remedy}"
    ):
        read(str(tmp_path / name))
    (tmp_path / name).write_bytes(content.encode("utf-16"))
    with pytest.raises(InputError, match="looks like utf-16"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize("reader", READERS)
def test_a_stated_encoding_is_used(tmp_path: Path, reader: str, encoding: str) -> None:
    name, content, read, found = READERS[reader]
    (tmp_path / name).write_text(content, encoding=encoding)
    assert read(str(tmp_path / name), encoding=encoding) == found
    with pytest.raises(InputError, match="unknown encoding 'utf-99'"):
        read(str(tmp_path / name), encoding="utf-99")


@pytest.mark.parametrize(
    ("text", "encoding", "seen"),
    [
        ("一只猫坐在桌子上", "gbk", "gb18030"),
        ("一隻貓坐在桌子上", "big5", "big5"),
        ("кошка и собака", "cp1251", "cp1251"),
        ("Löwe und Bär", "latin-1", "cp1252"),
        ("a “quoted” text", "cp1252", "cp1252"),
        ("plain", "utf-16-le", "utf-16-le"),
        ("plain", "utf-16", "utf-16"),
        ("plain", "utf-32", "utf-32"),
    ],
)
def test_the_encoding_that_a_text_looks_like(tmp_path: Path, text: str, encoding: str, seen: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(f"first\n{text}\n".encode(encoding))
    with pytest.raises(InputError, match=rf"looks like {seen} \(.*{text[-5:]}"):
        read_text(file)
    assert text in read_text(file, encoding=seen)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "a.png", "it is a PNG image"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=reason):
            read_text(path)
    with pytest.raises(InputError, match="not a regular file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(InputError, match="File name too long"):
        read_text("x" * 5000)


@pytest.mark.parametrize("mark", [b"\xef", b"\xef\xbb"])
def test_half_a_byte_order_mark_is_no_text(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(mark)
    with pytest.raises(InputError, match="it is not UTF-8: byte 0xEF in line 1"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        ('{"a": 1', r"Expecting ',' delimiter"),
    ],
)
def test_json_that_python_chokes_on_is_refused_by_all_three_readers(
    tmp_path: Path, text: str, reason: str
) -> None:
    readers = {
        "whole": lambda path: read_instances(path),
        "by entry": lambda path: listed(str(path)),
        "by line": lambda path: list(read_texts(path)),
    }
    for name, read in readers.items():
        file = tmp_path / ("a.jsonl" if name == "by line" else "a.json")
        file.write_text(text)
        with pytest.raises(InputError, match=reason):
            read(file)
