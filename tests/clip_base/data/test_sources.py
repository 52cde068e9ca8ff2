from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_base.data.coco import read_captions
from clip_base.data.sources import SOURCES, Pair
from clip_base.jobs.config import build_plugin
from clip_base.runtime.errors import InputError


def pairs(name: str, **options: Any) -> list[Pair]:
    source = build_plugin(SOURCES, {"name": name, **options})
    found: list[Pair] = source.pairs()
    return found


def coco(tmp_path: Path, data: Any) -> str:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(data))
    return str(path)


IMAGES = [
    {"id": 7, "file_name": "a.jpg"},
    {"id": 8, "file_name": "sub/b.jpg"},
    {"id": 9, "file_name": "c.jpg"},
]


def test_coco_captions_are_grouped_by_image(tmp_path: Path) -> None:
    captions = [(8, "a dog"), (7, " a  cat\n"), (8, "two dogs"), (9, "  ")]
    annotations = [{"image_id": i, "caption": text} for i, text in captions]
    file = coco(tmp_path, {"images": IMAGES, "annotations": annotations})
    found = pairs("coco", captions=file, images=str(tmp_path))
    dogs = Pair(tmp_path / "sub/b.jpg", ("a dog", "two dogs"))
    assert found == [dogs, Pair(tmp_path / "a.jpg", ("a cat",))]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "must have 'images' and 'annotations'"),
        ({"images": []}, "must have 'images' and 'annotations'"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\] needs a 'file_name'"),
        ({"images": IMAGES, "annotations": [{"image_id": 7}]}, r"annotations\[0\] needs a 'caption'"),
        (
            {"images": IMAGES, "annotations": [{"image_id": 7, "caption": None}]},
            "needs a 'caption', which must be a text",
        ),
        ({"images": IMAGES, "annotations": [{"image_id": 3, "caption": "x"}]}, "image_id 3"),
    ],
)
def test_malformed_coco_captions_are_refused(tmp_path: Path, data: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_captions(coco(tmp_path, data))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"captions file .* does not exist"):
        read_captions(tmp_path / "no.json")
    file = coco(tmp_path, {"images": [], "annotations": []})
    with pytest.raises(InputError, match=r"images folder .* does not exist"):
        pairs("coco", captions=file, images=str(tmp_path / "no"))
    for name in ("csv", "jsonl"):
        with pytest.raises(InputError, match="does not exist"):
            pairs(name, file=str(tmp_path / "no"))


@pytest.mark.parametrize(("ending", "mark"), [("csv", ","), ("tsv", "\t"), ("TSV", "\t")])
def test_a_table_groups_its_rows_by_image(tmp_path: Path, ending: str, mark: str) -> None:
    rows = [["image", "n", "caption"], ["a.jpg", "1", '"a cat, a ""big"" one"'], ["b.jpg", "2", "dög"]]
    rows += [["a.jpg", "3", "the cat"], ["c.jpg", "4", ""]]
    file = tmp_path / f"t.{ending}"
    file.write_text("\n".join(mark.join(row) for row in rows), encoding="utf-8-sig")
    cat = Pair(tmp_path / "a.jpg", ('a cat, a "big" one', "the cat"))
    assert pairs("csv", file=str(file)) == [cat, Pair(tmp_path / "b.jpg", ("dög",))]
    assert pairs("csv", file=str(file), images="/x")[1].image == Path("/x/b.jpg")


@pytest.mark.parametrize("name", ["csv", "jsonl", "parquet"])
def test_columns_are_found_by_their_usual_names_and_those_given_come_first(tmp_path: Path, name: str) -> None:
    record = {"caption": "a cat", "filename": "a.jpg", "text": "a dog", "path": "b.jpg"}
    file = tmp_path / f"t.{name}"
    if name == "csv":
        file.write_text(",".join(record) + "\n" + ",".join(record.values()) + "\n")
    elif name == "jsonl":
        file.write_text(json.dumps(record) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([record]), file)
    kind = "key" if name == "jsonl" else "column"
    assert pairs(name, file=str(file)) == [Pair(tmp_path / "a.jpg", ("a cat",))]
    given = {f"image_{kind}": "path", f"caption_{kind}": "text"}
    assert pairs(name, file=str(file), **given) == [Pair(tmp_path / "b.jpg", ("a dog",))]


def test_a_table_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("picture,words\na,b\n")
    told = r"no column 'image' \(or image_path, .*\); it has picture, words; set source.image_column="
    with pytest.raises(InputError, match=told):
        pairs("csv", file=str(file))
    assert len(pairs("csv", file=str(file), image_column="picture", caption_column="words")) == 1
    file.write_text("")
    with pytest.raises(InputError, match="is empty"):
        pairs("csv", file=str(file))


def test_a_table_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes("image,caption\na.jpg,dög\n".encode("latin-1"))
    with pytest.raises(
        InputError, match=r"line 2; it looks like cp1252 \('a.jpg,dög'\); save it as UTF-8 or give encoding"
    ):
        pairs("csv", file=str(file))


def test_json_lines_take_one_or_several_captions(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"image": "a.jpg", "caption": ["x", "y"]}\n\n{"image": "b.jpg", "caption": "z"}\n')
    assert pairs("jsonl", file=str(file)) == [
        Pair(tmp_path / "a.jpg", ("x", "y")),
        Pair(tmp_path / "b.jpg", ("z",)),
    ]


@pytest.mark.parametrize(
    "line", ['{"image": "a.jpg"}', '{"image": "a.jpg", "cap', "3", '{"image": "a", "caption": null}']
)
def test_a_malformed_line_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"image": "a.jpg", "caption": "x"}\n' + line)
    with pytest.raises(InputError, match=r"t\.jsonl, line 2"):
        pairs("jsonl", file=str(file))
