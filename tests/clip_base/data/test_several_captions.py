"""Several captions of an image, in every way that they are written: the source has all of them, in order.

Covered: the sources csv (a row each), jsonl (a list, a line each), parquet (a list, a row each), coco, folder
and webdataset (a line each; a list in JSON), and the captions of retrieval in CLIP_benchmark's layout.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_base.data.sources import SOURCES
from clip_base.evaluation.datasets import shard_captions
from clip_base.jobs.config import build_plugin

CAPTIONS = ("a cup, red", "a mug", "tea")


def source(name: str, **options: Any) -> list[tuple[str, ...]]:
    pairs = build_plugin(SOURCES, {"name": name, **options}).pairs()
    return [pairs[index].captions for index in range(len(pairs))]


def table(folder: Path) -> list[tuple[str, ...]]:
    rows = "".join(f'a.jpg,"{text}"\n' for text in CAPTIONS)
    (folder / "a.csv").write_text(f"image,caption\n{rows}")
    return source("csv", file=str(folder / "a.csv"))


def json_list(folder: Path) -> list[tuple[str, ...]]:
    (folder / "a.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": CAPTIONS}) + "\n")
    return source("jsonl", file=str(folder / "a.jsonl"))


def json_keys(folder: Path) -> list[tuple[str, ...]]:
    (folder / "a.jsonl").write_text(json.dumps({"path": "a.jpg", "texts": CAPTIONS, "image": 3}) + "\n")
    return source("jsonl", file=str(folder / "a.jsonl"), image_key="path", caption_key="texts")


def json_lines(folder: Path) -> list[tuple[str, ...]]:
    lines = (json.dumps({"image": "a.jpg", "caption": text}) + "\n" for text in CAPTIONS)
    (folder / "a.jsonl").write_text("".join(lines))
    return source("jsonl", file=str(folder / "a.jsonl"))


def parquet_list(folder: Path) -> list[tuple[str, ...]]:
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": [list(CAPTIONS)]}), folder / "a.parquet")
    return source("parquet", file=str(folder / "a.parquet"))


def coco(folder: Path) -> list[tuple[str, ...]]:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "caption": text} for text in CAPTIONS],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return source("coco", captions=str(folder / "a.json"), images=str(folder))


def beside(folder: Path, **options: Any) -> list[tuple[str, ...]]:
    (folder / "a.jpg").touch()
    (folder / "a.txt").write_text("\n".join(CAPTIONS) + "\n\n")
    return source("folder", folder=str(folder), **options)


def shard(folder: Path, extension: str, text: str) -> Path:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in (("a.jpg", b""), (f"a.{extension}", text.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / "a.tar"


def in_a_tar(folder: Path, **options: Any) -> list[tuple[str, ...]]:
    return source("webdataset", shards=str(shard(folder, "txt", "\n".join(CAPTIONS))), **options)


def in_a_tars_json(folder: Path) -> list[tuple[str, ...]]:
    path = shard(folder, "json", json.dumps({"alt": CAPTIONS}))
    return source("webdataset", shards=str(path), captions=["json.alt"])


def of_retrieval(folder: Path) -> list[tuple[str, ...]]:
    shard(folder, "txt", "\n".join(CAPTIONS))
    return shard_captions(folder)[1]


@pytest.mark.parametrize(
    "read",
    [
        table,
        json_list,
        json_keys,
        json_lines,
        parquet_list,
        coco,
        beside,
        in_a_tar,
        in_a_tars_json,
        of_retrieval,
    ],
)
def test_all_captions_of_an_image_are_read_in_order(
    read: Callable[[Path], list[tuple[str, ...]]], tmp_path: Path
) -> None:
    assert read(tmp_path) == [CAPTIONS]


@pytest.mark.parametrize("read", [beside, in_a_tar])
def test_lines_may_be_one_caption(read: Callable[..., list[tuple[str, ...]]], tmp_path: Path) -> None:
    assert read(tmp_path, split_lines=False) == [(" ".join(CAPTIONS),)]
