"""Manifests and tables of images that declare more than there is: refused before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_base.runtime.errors import InputError
from clip_base.storage.files import write_json
from regionclip.mining.shards import VERSION, MinedRegion, images_path, shard_path, write_rows
from regionclip.training.mined import MinedSamples

HUGE = 2**31 - 1


def mined(folder: Path, **changes: Any) -> Path:
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(b"-")
    region = MinedRegion(1, "a.jpg", 8, 8, (0, 0, 4, 4), 0.5, [0], [1.0], "cup", None, None)
    write_rows(shard_path(folder, 0), [region])
    manifest = {"version": VERSION, "shards": ["shard-00000.parquet"], "tars": {}, "samples": [1]}
    manifest |= {"max_concepts": 1, "regions": 1, "images_folder": str(folder / "images")}
    write_json(folder / "manifest.json", {**manifest, **changes})
    return folder


def samples(folder: Path) -> list[Any]:
    return list(MinedSamples(folder, folder / "cache", str(folder / "images")))


def test_a_whole_folder_is_read(tmp_path: Path) -> None:
    assert len(samples(mined(tmp_path))) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_concepts": 10**12}, "max_concepts is 1000000000000"),
        ({"samples": [3]}, "counts 3 samples of shard shard-00000.parquet, which holds fewer"),
        ({"shards": [7]}, r"shards is \[7\]"),
        ({"images_folder": None}, "images_folder is None"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        samples(mined(tmp_path, **changes))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("regions", HUGE, "do not fit each other"),
        ("regions", -1, r"row 0: regions must be a count"),
        ("file_name", None, "row 0: file_name"),
        ("image_id", 2, "do not fit each other"),
    ],
)
def test_a_table_of_images_that_is_wrong_is_refused(
    tmp_path: Path, column: str, value: object, told: str
) -> None:
    path = images_path(shard_path(mined(tmp_path), 0))
    table = pq.read_table(path)
    field = table.schema.field(column)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, field, pa.array([value], field.type)), path)
    with pytest.raises(InputError, match=told):
        samples(tmp_path)
