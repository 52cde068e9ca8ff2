"""Boxes go from any format into any other and stay the same boxes."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_base.data.coco import coco_entry, read_instances
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, write_json
from regionclip.data.annotations import CocoDetection
from regionclip.export.convert_data import ConvertDataConfig, convert_data

BOXES = {"a.jpg": [("cat", (8, 6, 32, 24), 0), ("dog", (40, 30, 40, 30), 1)], "sub/b.jpg": []}
SIZES = {"a.jpg": (80, 60), "sub/b.jpg": (50, 100)}
READ = {"coco": "instances.json", "voc": "Annotations", "yolo": "labels"}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Annotations in COCO's format with one crowd, and their images."""
    images, annotations = [], []
    for number, (name, size) in enumerate(SIZES.items(), 1):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(file)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for category, box, crowd in BOXES[name]:
            entry = coco_entry(number, ["cat", "dog"].index(category) + 1, box, iscrowd=crowd)
            annotations.append({"id": len(annotations) + 1, **entry})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(tmp_path / "instances.json", content)
    return {"annotations": str(tmp_path / "instances.json"), "images": str(tmp_path / "images")}


def boxes_of(path: Path) -> list[tuple[str, str, list[float], bool]]:
    dataset = CocoDetection(path, None)
    return [
        (str(record.path), dataset.categories[label], box, crowd)
        for record in dataset
        for box, label, crowd in zip(
            record.boxes.tolist(), record.labels.tolist(), record.iscrowd.tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("kind", READ)
def test_there_and_back_is_the_same(kind: str, data: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_data(ConvertDataConfig(**data, out=str(out), format=kind))
    wanted = boxes_of(Path(data["annotations"]))
    if kind == "yolo":  # which has no place for a crowd
        wanted = [box for box in wanted if not box[3]]
    found = boxes_of(out / READ[kind])
    assert [row[:2] + row[3:] for row in found] == [row[:2] + row[3:] for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours[2] == pytest.approx(theirs[2], abs=1e-3)
    assert {entry["file_name"] for entry in read_instances(out / READ[kind])["images"]} == set(SIZES)


def test_what_is_written_for_yolo_is_read_by_its_data_yaml_too(data: dict[str, str], tmp_path: Path) -> None:
    convert_data(ConvertDataConfig(**data, out=str(tmp_path / "out"), format="yolo"))
    assert boxes_of(tmp_path / "out" / "data.yaml") == boxes_of(tmp_path / "out" / "labels")


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_images_in_tars_are_copied_beside_the_labels(kind: str, data: dict[str, str], tmp_path: Path) -> None:
    for number, name in enumerate(SIZES):
        with tarfile.open(tmp_path / f"part-{number}.tar", "w") as tar:
            tar.add(tmp_path / "images" / name, name)
    options = {**data, "images": str(tmp_path / "part-{0..1}.tar"), "format": kind}
    convert_data(ConvertDataConfig(**options, out=str(tmp_path / "out")))
    beside = tmp_path / "out" / {"voc": "JPEGImages", "yolo": "images"}[kind]
    assert not beside.is_symlink()
    for name in SIZES:
        assert (beside / name).read_bytes() == (tmp_path / "images" / name).read_bytes()
    shutil.rmtree(tmp_path / "images")
    assert {entry["file_name"] for entry in read_instances(tmp_path / "out" / READ[kind])["images"]} == set(
        SIZES
    )


def test_a_table_has_a_row_per_box_and_one_for_an_empty_image(data: dict[str, str], tmp_path: Path) -> None:
    convert_data(ConvertDataConfig(**data, out=str(tmp_path / "boxes.csv"), format="csv"))
    with (tmp_path / "boxes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file_name"], row["name"], row["x2"], row["ignored"]) for row in rows] == [
        ("a.jpg", "cat", "40.00", "0"),
        ("a.jpg", "dog", "80.00", "1"),
        ("sub/b.jpg", "", "", ""),
    ]


def test_detections_are_written_instead(data: dict[str, str], tmp_path: Path) -> None:
    results = [
        {**coco_entry(7, 1, (1, 2, 3, 4), score), "file_name": "b.jpg", "category_name": "dog"}
        for score in (0.9, 0.2)
    ]
    write_json(tmp_path / "results.json", results)
    options: dict[str, Any] = {**data, "results": str(tmp_path / "results.json")}
    convert_data(ConvertDataConfig(**options, out=str(tmp_path / "yolo"), format="yolo"))
    assert (tmp_path / "yolo/labels/sub/b.txt").read_text() == "1 0.050000 0.040000 0.060000 0.040000\n"
    assert (tmp_path / "yolo/labels/a.txt").read_text() == ""
    convert_data(ConvertDataConfig(**options, out=str(tmp_path / "labels.json"), score_threshold=0.1))
    assert [one["score"] for one in read_json(tmp_path / "labels.json")["annotations"]] == [0.9, 0.2]


def test_the_same_call_returns_and_changed_data_is_another_run(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ConvertDataConfig(**data, out=str(tmp_path / "voc"), format="voc")
    convert_data(config)
    convert_data(config)
    assert "already exists and was made with the same options" in capsys.readouterr().out
    content = read_json(data["annotations"])
    content["annotations"][0]["bbox"][2] += 1
    write_json(Path(data["annotations"]), content)
    with pytest.raises(InputError, match="was made with other options"):
        convert_data(config)


def test_supervision_reads_what_is_written(data: dict[str, str], tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    convert_data(ConvertDataConfig(**data, out=str(tmp_path / "voc"), format="voc"))
    found = supervision.DetectionDataset.from_pascal_voc(
        str(tmp_path / "images"), str(tmp_path / "voc" / "Annotations")
    )
    boxes = {Path(path).name: item.xyxy.tolist() for path, _, item in found}
    assert boxes["a.jpg"] == [pytest.approx([8, 6, 40, 30]), pytest.approx([40, 30, 80, 60])]


def test_names_do_not_lead_out_of_the_folder(data: dict[str, str], tmp_path: Path) -> None:
    content = read_json(data["annotations"])
    content["images"][0]["file_name"] = "../a.jpg"
    (tmp_path / "instances.json").write_text(json.dumps(content))
    Image.new("RGB", (80, 60)).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="leads out of"):
        convert_data(ConvertDataConfig(**data, out=str(tmp_path / "out" / "voc"), format="voc"))
    assert not list((tmp_path / "out").rglob("a.xml"))
