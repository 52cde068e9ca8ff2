"""Shards give back what was written, and say so when they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clip_base.runtime.errors import InputError
from regionclip.mining.shard_writer import ShardWriter
from regionclip.mining.shards import (
    SCHEMA,
    VERSION,
    MinedImage,
    MinedRegion,
    image_rows,
    image_table,
    read_manifest,
    read_regions,
    region_table,
    shard_path,
    write_rows,
    write_shard,
)


def region(image_id: int, phrase: str | None = "a red cup") -> MinedRegion:
    box = (1.5, 2.25, 30.0, 40.75)
    return MinedRegion(
        image_id,
        "train/ü.jpg",
        64,
        48,
        box,
        0.5,
        [3, 0],
        [0.75, 0.125],
        "cup",
        phrase,
        phrase and "A red cup.",
    )


def finished(folder: Path, *parts: list[MinedRegion]) -> Path:
    for number, part in enumerate(parts):
        write_rows(shard_path(folder, number), part)
    names = [shard_path(folder, number).name for number in range(len(parts))]
    (folder / "manifest.json").write_text(json.dumps({"version": VERSION, "shards": names}))
    return folder


def test_rows_come_back_as_written_in_the_manifests_order(tmp_path: Path) -> None:
    rows = [region(1), region(1, None), region(2)]
    folder = finished(tmp_path, rows[:2], [], rows[2:])
    found = list(read_regions(folder))
    assert [(row.image_id, row.phrase, row.caption) for row in found] == [
        (row.image_id, row.phrase, row.caption) for row in rows
    ]
    for row, wanted in zip(found, rows, strict=True):
        assert tuple(row.box) == wanted.box
        assert (row.concept_ids, row.concept_probs) == (wanted.concept_ids, wanted.concept_probs)
        assert (row.file_name, row.height, row.width) == ("train/ü.jpg", 64, 48)


def test_files_have_the_published_schema(tmp_path: Path) -> None:
    write_rows(tmp_path / "one.parquet", [region(1)])
    assert pq.read_schema(tmp_path / "one.parquet").equals(SCHEMA)


def test_every_image_has_a_row_whether_it_has_regions_or_not(tmp_path: Path):
    images = [
        MinedImage(1, "1.jpg", 1, ("a red cup",)),
        MinedImage(2, "2.jpg", reason="wörn out", unreadable=True),
    ]
    assert write_rows(tmp_path / "one.parquet", [region(1)], images) == 1
    assert list(image_rows(tmp_path / "images" / "one.parquet")) == images
    assert images[1].skipped == {
        "image_id": 2, "file_name": "2.jpg", "reason": "wörn out", "unreadable": True
    }  # fmt: skip
    write_rows(tmp_path / "two.parquet", [])
    assert list(image_rows(tmp_path / "images" / "two.parquet")) == []
    (tmp_path / "images" / "two.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        list(image_rows(tmp_path / "images" / "two.parquet"))


def test_a_shards_bytes_depend_on_its_rows_alone(tmp_path: Path):
    rows = [region(number) for number in range(12_000)]
    images = [MinedImage(number, f"{number}.jpg", 1) for number in range(12_000)]
    for name, step in (("one", 12_000), ("two", 700)):
        parts = range(0, len(rows), step)
        write_shard(
            tmp_path / name / "a.parquet",
            (region_table(rows[start : start + step]) for start in parts),
            (image_table(images[start : start + step]) for start in parts),
        )
    for file in ("a.parquet", "images/a.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_writer_resumes_behind_what_was_saved(tmp_path: Path):
    rows = [(MinedImage(number, f"{number}.jpg", 1), region(number)) for number in range(10)]
    whole, broken = ShardWriter(tmp_path / "whole.parquet"), ShardWriter(tmp_path / "broken.parquet")
    for image, own in rows:
        whole.add([image], [own])
    assert whole.finish() == 10
    for image, own in rows[:4]:
        broken.add([image], [own])
    broken.save()
    broken.add([rows[4][0]], [rows[4][1]])  # is lost: it was not saved
    again = ShardWriter(tmp_path / "broken.parquet")
    assert (again.done, again.regions) == (4, 4)
    for image, own in rows[4:]:
        again.add([image], [own])
    assert again.finish() == 10
    for name in ("", "images/"):
        found = [(tmp_path / f"{name}{which}.parquet").read_bytes() for which in ("whole", "broken")]
        assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.parquet", "images", "whole.parquet"]


def test_more_regions_than_are_made_a_table_at_once_stay_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regionclip.mining.shards._ROWS", 3)
    folder = finished(tmp_path, [region(number) for number in range(10)])
    assert [row.image_id for row in read_regions(folder)] == list(range(10))


def test_an_unfinished_folder_is_no_data(tmp_path: Path) -> None:
    write_rows(shard_path(tmp_path, 0), [region(1)])
    with pytest.raises(InputError, match="mining is not finished"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 99, "shards": []}')
    with pytest.raises(InputError, match="version 99, this program reads 3"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        (0, "is an empty file"),
        *((size, "cannot be read as Parquet .*delete it and run") for size in (10, 300)),
    ],
)
def test_a_cut_shard_is_named(tmp_path: Path, size: int, fault: str) -> None:
    folder = finished(tmp_path, [region(1)])
    path = shard_path(folder, 0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=rf"shard .*shard-00000\.parquet {fault}"):
        list(read_regions(folder))


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    folder = finished(tmp_path, [region(1)], [region(2)])
    shard_path(folder, 1).unlink()
    with pytest.raises(InputError, match=r"shard-00001\.parquet does not exist"):
        list(read_regions(folder))


def test_a_foreign_parquet_file_is_no_shard(tmp_path: Path) -> None:
    import pyarrow as pa

    folder = finished(tmp_path, [region(1)])
    pq.write_table(pa.table({"words": ["one"]}), shard_path(folder, 0))
    with pytest.raises(InputError, match=r"is not a shard of mined regions \(its columns: words\)"):
        list(read_regions(folder))


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer: object, table: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        write_rows(shard_path(tmp_path, 0), [region(1)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
