"""`detect` and `features` take the images of a tar, named by tar and member, with a folder's results."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from clip_base.storage.files import read_json

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def tar(photos: Path, tmp_path: Path) -> Path:
    """The four images, and a text, in a tar."""
    (photos.parent / "notes.txt").write_text("no image")
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as written:
        for file in sorted(photos.iterdir()):
            written.add(file, f"deep/{file.name}")
        written.add(photos.parent / "notes.txt", "deep/notes.txt")
    return path


def test_detections_in_a_tar_are_those_in_the_folder(
    photos: Path, tar: Path, options: list[str], regionclip: Command, tmp_path: Path
) -> None:
    found: dict[Path, list[dict[str, Any]]] = {}
    for place in (photos, tar):
        out = tmp_path / f"found-{place.name}"
        code, told = regionclip("detect", place, *options[:-1], "precision=fp32", f"out={out}")
        assert code == 0, told
        found[place] = read_json(out / "detections.json")
        names = {Path(entry["file_name"]).name for entry in found[place]}
        drawn = {file.name for file in out.rglob("*") if file.suffix in (".png", ".jpg")}
        assert drawn == names == {file.name for file in photos.iterdir()}
    assert {Path(entry["file_name"]).parent for entry in found[tar]} == {tar / "deep"}
    plain = [[{**entry, "file_name": ""} for entry in entries] for entries in found.values()]
    assert plain[0] == plain[1]
    assert len(plain[0]) > 20


def test_features_of_a_tar_are_those_of_the_folder(
    photos: Path, tar: Path, options: list[str], regionclip: Command, tmp_path: Path
) -> None:
    rows: dict[Path, list[dict[str, Any]]] = {}
    for place in (photos, tar):
        out = tmp_path / f"features-{place.name}"
        code, told = regionclip("features", place, *options[:-1], "precision=fp32", f"out={out}")
        assert code == 0, told
        rows[place] = [
            row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
        ]
    files = sorted(photos.iterdir())
    assert {row["file_name"] for row in rows[tar]} == {f"{tar}/deep/{file.name}" for file in files}
    names = [Path(row.pop("file_name")).name for row in rows[photos]]
    assert names == [Path(row.pop("file_name")).name for row in rows[tar]]
    assert rows[photos] == rows[tar]
    assert len(names) > 20
