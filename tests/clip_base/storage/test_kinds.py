"""A file of another kind is told by what it is, and a damaged one of the right kind as before."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from clip_base.data.coco import read_captions, read_instances
from clip_base.images.headers import open_image_file
from clip_base.images.video import Video
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.storage.json_stream import stream_entries
from clip_base.storage.kinds import kind_of, kind_of_bytes
from clip_base.storage.parquet_files import open_parquet
from clip_base.weights.load import load_clip
from clip_base.weights.native import read_weights


def image(form: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(file, form)
    return file.getvalue()


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))


FILES = {
    "a JPEG image": image("JPEG"),
    "a PNG image": image("PNG"),
    "a WebP image": image("WEBP"),
    "a BMP image": image("BMP"),
    "a zip archive": written(zipped),
    "a tar archive": written(tarred),
    "a gzip archive": gzip.compress(b"text"),
    "a PyTorch file": written(lambda file: torch.save({"a": torch.zeros(2)}, file)),
    "a Python pickle": pickle.dumps({"a": 1}),
    "a safetensors file": save({"a": torch.zeros(2)}),
    "a NumPy array (.npy)": written(lambda file: np.save(file, np.zeros(2))),
    "a Parquet table": written(lambda file: pq.write_table(pa.table({"a": [1]}), file)),
    "JSON": b'\xef\xbb\xbf {"images": [],\n "annotations": []}',
    "JSON Lines (one object per line)": b'{"a": 1}\n{"a": 2}\n',
    "a CSV table": b'image,caption\na.jpg,"a cat, asleep"\nb.jpg,a dog\n',
    "a TSV table": b"image\tcaption\na.jpg\ta cat\n",
    "an HTML page": b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "XML": b'<?xml version="1.0"?><annotation></annotation>',
    "a list of numbers, as YOLO's labels are": b"0 0.5 0.5 0.1 0.1\n1 0.2 0.2 0.1 0.1\n",
    "an empty file": b"",
    "": b"a cat on a mat\na dog in the fog",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_told_by_its_first_bytes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(FILES[kind])
    assert kind_of(tmp_path / "file") == kind
    assert kind_of_bytes(FILES[kind][: 1 << 12]) == kind


@pytest.mark.parametrize(
    "read", [read_json, read_instances, read_captions, lambda p: list(stream_entries(p))]
)
@pytest.mark.parametrize("kind", ["a CSV table", "JSON Lines (one object per line)", "a JPEG image", "XML"])
def test_a_file_of_another_kind_is_not_called_truncated(
    kind: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    file = tmp_path / "captions.json"
    file.write_bytes(FILES[kind])
    with pytest.raises(InputError) as told:
        read(file)
    assert kind in str(told.value)
    assert "truncated" not in str(told.value)


def test_a_truncated_file_of_the_right_kind_is_called_so(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": [{"id": 1}], "annotations": []})[:-20])
    with pytest.raises(InputError, match="was it truncated"):
        read_json(file)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("w.safetensors", read_weights),
        ("w.pth", load_clip),
        ("a.jpg", lambda path: open_image_file(path).__enter__()),
        ("a.mp4", Video),
        ("a.parquet", lambda path: open_parquet(path).__enter__()),
    ],
)
def test_other_gates_name_what_they_were_given(
    name: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(FILES["a CSV table"])
    with pytest.raises(InputError, match=r"a CSV table"):
        read(tmp_path / name)
