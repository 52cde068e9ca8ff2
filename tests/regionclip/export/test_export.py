"""Mined pairs become annotations that detectors train on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO

from clip_base.jobs.cli import main_regionclip
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, write_json
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.data.annotations import CocoDetection
from regionclip.export.label_writers import FiftyOneWriter, YoloWriter
from regionclip.export.pseudo_labels import ExportConfig, export
from regionclip.mining.shards import VERSION, MinedRegion, read_regions, shard_path, write_rows
from regionclip.structures.boxes import iou
from regionclip.structures.labels import LabeledImage, LabelTarget

NAMES = ("cup", "telly", "red cup")


def region(
    image_id: int, box: tuple[float, ...], ids: list[int], probs: list[float], level: float = 1.0
) -> MinedRegion:
    name = NAMES[ids[0]]
    return MinedRegion(image_id, f"a/{image_id}.jpg", 80, 100, box, level, ids, probs, name, None, None)  # type: ignore[arg-type]


REGIONS = [
    region(1, (0, 0, 40, 40), [0, 1], [0.6, 0.4], 0.5),
    region(1, (2, 2, 40, 40), [0, 2], [0.5, 0.4], 0.9),  # overlaps the first, and is the better proposal
    region(1, (0, 0, 40, 42), [1, 0], [0.9, 0.0]),
    region(2, (50, 10, 90, 70), [2, 0], [0.3, 0.2], 0.1),
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "mined"
    write_rows(shard_path(folder, 0), REGIONS[:3])
    write_rows(shard_path(folder, 1), REGIONS[3:])
    Vocabulary(NAMES, torch.eye(3)).save(folder / "vocabulary.safetensors")
    (tmp_path / "photos").mkdir()
    manifest: dict[str, Any] = {"version": VERSION, "shards": ["shard-00000.parquet", "shard-00001.parquet"]}
    manifest |= {"images": 3, "skipped": 1, "images_folder": str(tmp_path / "photos")}
    write_json(folder / "manifest.json", manifest)
    return folder


def exported(pairs: Path, **options: Any) -> list[tuple[int, str, list[float]]]:
    """Returns (image, category, box as x, y, width, height) of all annotations, as pycocotools reads them."""
    out = pairs.with_name("instances.json")
    out.unlink(missing_ok=True)
    export(ExportConfig(str(pairs), str(out), **options))
    coco = COCO(out)
    names = {key: value["name"] for key, value in coco.cats.items()}
    return [
        (one["image_id"], names[one["category_id"]], one["bbox"]) for one in coco.loadAnns(coco.getAnnIds())
    ]


def test_each_region_becomes_a_box_of_its_first_concept(pairs: Path) -> None:
    assert exported(pairs, nms=1.0) == [
        (1, "cup", [0, 0, 40, 40]),
        (1, "cup", [2, 2, 38, 38]),
        (1, "telly", [0, 0, 40, 42]),
        (2, "red cup", [50, 10, 40, 60]),
    ]
    content = read_json(pairs.with_name("instances.json"))
    assert content["images"][0] == {"id": 1, "file_name": "a/1.jpg", "height": 80, "width": 100}
    assert content["categories"] == [
        {"id": 1, "name": "cup"},
        {"id": 2, "name": "telly"},
        {"id": 3, "name": "red cup"},
    ]
    first = content["annotations"][0]
    assert (first["area"], first["iscrowd"], first["score"]) == (1600, 0, pytest.approx(0.3))


def test_doubles_of_a_category_are_dropped_and_the_best_proposal_stays(pairs: Path) -> None:
    assert exported(pairs)[:2] == [(1, "cup", [2, 2, 38, 38]), (1, "telly", [0, 0, 40, 42])]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"min_probability": 0.55}, [(1, "cup"), (1, "telly")]),
        ({"min_objectness": 0.6}, [(1, "cup"), (1, "telly")]),
        (
            {"labels": 2, "nms": 1.0, "min_probability": 0.35},
            [(1, "cup"), (1, "telly"), (1, "cup"), (1, "red cup"), (1, "telly")],
        ),
        ({"labels": 5, "min_objectness": 0.95}, [(1, "telly")]),  # a probability of 0 is no label
    ],
)
def test_thresholds_say_what_becomes_a_label(
    pairs: Path, options: dict[str, Any], wanted: list[tuple[int, str]]
) -> None:
    assert [found[:2] for found in exported(pairs, **options)] == wanted


def test_a_class_list_gives_the_categories_and_synonyms_count(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("zebra\ntv, telly\n")
    assert exported(pairs, classes=[str(tmp_path / "classes.txt")]) == [(1, "tv", [0, 0, 40, 42])]
    content = read_json(tmp_path / "instances.json")
    assert content["categories"] == [{"id": 1, "name": "zebra"}, {"id": 2, "name": "tv"}]
    assert [image["id"] for image in content["images"]] == [1]
    exported(pairs, classes=[str(tmp_path / "classes.txt")], keep_empty=True)
    assert [image["id"] for image in read_json(tmp_path / "instances.json")["images"]] == [1, 2]


def test_a_class_list_without_any_mined_concept_is_refused(pairs: Path) -> None:
    with pytest.raises(InputError, match="none of the 3 mined concepts is a class of zebra"):
        exported(pairs, classes=["zebra"])


def test_the_same_call_again_returns_and_another_is_refused(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExportConfig(str(pairs), str(pairs.with_name("instances.json")))
    export(config)
    assert "3 boxes of 3 of 3 categories in 2 images" in capsys.readouterr().out
    before = Path(config.out).stat().st_mtime_ns
    export(config)
    assert "already exists" in capsys.readouterr().out
    assert Path(config.out).stat().st_mtime_ns == before
    with pytest.raises(InputError, match="was made with other options"):
        export(dataclasses.replace(config, nms=1.0))
    write_json(pairs / "manifest.json", read_json(pairs / "manifest.json") | {"images": 4})
    with pytest.raises(InputError, match="was made with other options"):
        export(config)
    with pytest.raises(InputError, match="is a folder; give a file"):
        export(dataclasses.replace(config, out=str(pairs)))


def test_yolo_finds_its_labels_and_pictures(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "yolo"
    config = ExportConfig(str(pairs), str(out), format="yolo", images=str(tmp_path / "photos"))
    export(config)
    assert (out / "train.txt").read_text() == "./images/a/1.jpg\n./images/a/2.jpg\n"
    assert (out / "labels/a/2.txt").read_text() == "2 0.700000 0.500000 0.400000 0.750000\n"
    assert len((out / "labels/a/1.txt").read_text().splitlines()) == 2
    assert (out / "images").resolve() == tmp_path / "photos"
    from omegaconf import OmegaConf

    described: Any = OmegaConf.load(out / "data.yaml")
    assert described.names == {0: "cup", 1: "telly", 2: "red cup"}
    assert (described.path, described.train) == (str(out), "train.txt")
    export(config)
    assert "already exists" in capsys.readouterr().out
    with pytest.raises(InputError, match="was made with other options"):
        export(dataclasses.replace(config, nms=1.0))


@pytest.mark.parametrize("options", [{"nms": 2}, {"min_probability": -1}, {"labels": 0}])
def test_options_out_of_range_are_refused(pairs: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        exported(pairs, **options)


def test_a_detector_trains_on_what_was_mined(
    mined: Path, world: Path, rpn_file: Path, clip_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "instances.json"
    assert main_regionclip(["export", f"mined={mined}", f"out={out}", "labels=1", "nms=0.5"]) == 0
    dataset = CocoDetection(out, world / "images")
    assert dataset.problems == {}
    assert {record.image_id for record in dataset} == {row.image_id for row in read_regions(mined)}
    for record in dataset:
        for label in record.labels.unique():
            boxes = record.boxes[record.labels == label]
            assert float((iou(boxes, boxes) - torch.eye(len(boxes))).max()) <= 0.5 + 1e-4
    names = list(dataset.categories)
    (tmp_path / "split.json").write_text(json.dumps({"base": names[:-1], "novel": names[-1:]}))
    options = [
        "train.steps=1",
        "train.batch_size=2",
        "resize.short=[64]",
        "resize.long=64",
        "max_proposals=20",
        "rois_per_image=8",
    ]
    options += [f"annotations={out}", f"images={world / 'images'}", f"split={tmp_path / 'split.json'}"]
    options += [f"weights={clip_file}", f"rpn={rpn_file}", f"out={tmp_path / 'detector'}"]
    assert main_regionclip(["train-detector", *options]) == 0
    assert (tmp_path / "detector" / "model.safetensors").exists()


def test_fiftyone_finds_labels_and_pictures(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fiftyone"
    config = ExportConfig(str(pairs), str(out), format="fiftyone", images=str(tmp_path / "photos"))
    export(config)
    # The layout of fiftyone.types.COCODetectionDataset: data/ and, with paths in it, labels.json.
    labels = read_json(out / "labels.json")
    assert (out / "data").resolve() == tmp_path / "photos"
    assert [image["file_name"] for image in labels["images"]] == ["a/1.jpg", "a/2.jpg"]
    assert labels["categories"][1] == {"id": 2, "name": "telly"}
    first = labels["annotations"][0]
    assert (first["bbox"], first["score"]) == ([2, 2, 38, 38], pytest.approx(0.45))
    export(config)
    assert "already exists" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; format=fiftyone writes a folder"):
        export(dataclasses.replace(config, out=str(tmp_path / "file")))


@pytest.mark.parametrize(("kind", "folder"), [(YoloWriter, "labels"), (FiftyOneWriter, "data")])
@pytest.mark.parametrize("name", ["../outside.jpg", "/outside.jpg", "a/../../outside.jpg"])
def test_names_from_data_never_lead_out_of_the_folder(
    tmp_path: Path, name: str, kind: Any, folder: str
) -> None:
    (tmp_path / "images").mkdir()
    writer = kind(LabelTarget(tmp_path / "out", ["cat"], str(tmp_path / "images"), {}))
    image = LabeledImage(1, name, 10, 10, [[0.0, 0.0, 5.0, 5.0]], [0], [1.0])
    with pytest.raises(InputError, match=f"leads out of {folder}/"), writer:
        writer.add(image)
    assert not list(tmp_path.rglob("outside*"))
    assert not (tmp_path / "out" / "labels.json").exists()


@pytest.mark.parametrize(("kind", "labels"), [("yolo", "labels"), ("voc", "Annotations")])
def test_what_a_killed_export_was_writing_is_gone_in_the_end(
    kind: str, labels: str, pairs: Path, tmp_path: Path
) -> None:
    config = ExportConfig(str(pairs), str(tmp_path / "out"), format=kind, images=str(tmp_path / "photos"))
    export(config)
    info = tmp_path / "out" / "info.json"
    write_json(info, read_json(info) | {"complete": False})
    left = tmp_path / "out" / labels / "a" / ".1.txt.999999999.tmp"
    left.write_text("0 0.5")
    export(config)
    assert read_json(info)["complete"]
    assert not left.exists()


@pytest.mark.parametrize("kind", ["yolo", "voc", "fiftyone"])
def test_no_link_leads_to_a_folder_that_only_a_manifest_names(kind: str, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"format={kind} has the images beside the labels: give images=FOLDER"
    ):
        export(ExportConfig(str(pairs), str(tmp_path / "out"), format=kind))
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_names_the_label_writers(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'yolo'"):
        export(ExportConfig(str(pairs), str(tmp_path / "out"), format="yollo"))
