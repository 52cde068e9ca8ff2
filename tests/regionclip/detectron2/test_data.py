"""Datasets of the catalogs, the mapper, the evaluator, and structures there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.data.annotations import CocoDetection
from regionclip.structures.detections import Detections
from regionclip.structures.regions import Regions

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from regionclip.detectron2.catalog import class_names, register_dataset
from regionclip.detectron2.mapper import RegionMapper
from regionclip.detectron2.structures import from_instances, from_proposals, to_instances, to_proposals
from regionclip.detectron2.training import OpenVocabularyEvaluator

MakeCfg = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "count", "novel"),
    [
        ("coco_2017_ovd_b_train", 48, 0),
        ("coco_2017_ovd_t_test", 17, 17),
        ("coco_2017_ovd_all_test", 65, 17),
        ("lvis_v1_ovd_b_train", 866, 0),
        ("lvis_v1_ovd_t_test", 337, 337),
        ("lvis_v1_ovd_all_test", 1203, 337),
    ],
)
def test_the_published_splits_are_in_the_catalogs(name: str, count: int, novel: int) -> None:
    names, novel_names = class_names(name)
    assert (len(names), len(novel_names)) == (count, novel)
    assert name in DatasetCatalog.list()


def test_training_sees_no_box_of_a_novel_class(world: Path) -> None:
    annotations, split = world / "instances_train.json", read_json(world / "split.json")
    register_dataset("test_base", annotations, world / "images", str(world / "split.json"), "base")
    entries = DatasetCatalog.get("test_base")
    assert MetadataCatalog.get("test_base").thing_classes == split["base"]
    counts = torch.zeros(len(split["base"]), dtype=torch.int64)
    for entry in entries:
        for annotation in entry["annotations"]:
            counts[annotation["category_id"]] += 1
    dataset = CocoDetection(annotations, world / "images", split["base"])
    wanted = torch.cat([record.labels for record in dataset]).bincount(minlength=len(counts))
    assert counts.equal(wanted)
    assert counts.sum() > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"part": "rare"}, "'rare' is not a part of a split; give one of base, novel, all"),
        ({"split": "coco"}, "split coco: .* are not among the annotations"),
        ({"annotations": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_what_cannot_be_registered_is_named(change: dict[str, str], told: str, world: Path) -> None:
    given = {
        "annotations": str(world / "instances_train.json"),
        "images": str(world / "images"),
        "split": str(world / "split.json"),
    }
    with pytest.raises(InputError, match=told):
        register_dataset("test_wrong", **{**given, **change})


def test_classes_of_an_unknown_dataset_are_asked_for() -> None:
    with pytest.raises(InputError, match=r"no class names of dataset 'nothing'.*set_vocabulary"):
        class_names("nothing")


def test_the_mapper_mirrors_boxes_with_their_image(detector_file: Path, make_cfg: MakeCfg) -> None:
    mapper = RegionMapper(make_cfg(detector_file), True)
    entry = next(entry for entry in DatasetCatalog.get("world_b_train") if entry["annotations"])
    still, mirrored = None, None
    for seed in range(20):
        torch.manual_seed(seed)
        sample = mapper(entry)
        plain = RegionMapper(make_cfg(detector_file), False)(entry)
        if sample["image"].equal(plain["image"]):
            still = sample["instances"].gt_boxes.tensor
        else:
            assert sample["image"].equal(plain["image"].flip(2))
            mirrored = sample["instances"].gt_boxes.tensor
    assert still is not None
    assert mirrored is not None
    torch.testing.assert_close(mirrored[:, [2, 0]], 64 - still[:, [0, 2]])
    torch.testing.assert_close(mirrored[:, [1, 3]], still[:, [1, 3]])


@pytest.mark.parametrize(
    "change",
    [
        {"INPUT.CROP.ENABLED": True},
        {"INPUT.RANDOM_FLIP": "vertical"},
        {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
    ],
    ids=str,
)
def test_what_the_mapper_does_not_do_is_refused(
    change: dict[str, Any], detector_file: Path, make_cfg: MakeCfg
) -> None:
    with pytest.raises(InputError, match="is not supported by RegionMapper"):
        RegionMapper(make_cfg(detector_file, change), True)


def test_true_boxes_are_found_with_an_ap_of_100(
    detector_file: Path, make_cfg: MakeCfg, tmp_path: Path
) -> None:
    make_cfg(detector_file)  # registers the world
    evaluator = OpenVocabularyEvaluator("world_all_test", tmp_path)
    evaluator.reset()
    for entry in DatasetCatalog.get("world_all_test"):
        boxes = torch.tensor([one["bbox"] for one in entry["annotations"]]).reshape(-1, 4)
        labels = torch.tensor([one["category_id"] for one in entry["annotations"]], dtype=torch.int64)
        size = (entry["height"], entry["width"])
        truth = Detections(boxes, torch.ones(len(boxes)), labels, class_names("world_all_test")[0], size)
        evaluator.process([entry], [{"instances": to_instances(truth)}])
    found = evaluator.evaluate()
    assert found is not None
    assert found["bbox"]["AP50_base"] == pytest.approx(100)
    assert found["bbox"]["AP50_all"] == pytest.approx(100)
    assert read_json(tmp_path / "results.json")


def test_detections_come_back_from_instances() -> None:
    boxes = torch.tensor([[0.0, 1.0, 5.0, 6.0], [2.0, 2.0, 4.0, 8.0]])
    one = Detections(boxes, torch.tensor([0.9, 0.25]), torch.tensor([1, 0]), ("cat", "dog"), (10, 12))
    back = from_instances(to_instances(one), one.names)
    assert back.boxes.equal(one.boxes)
    assert back.scores.equal(one.scores)
    assert back.labels.equal(one.labels)
    assert (back.names, back.size) == (one.names, one.size)


def test_proposals_come_back_with_their_logits() -> None:
    sizes = [(10, 10), (8, 8), (6, 6)]
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0]])
    logits = torch.tensor([30.0, -2.0, 0.5])
    regions = Regions(boxes, torch.tensor([0, 0, 2]), scores=logits.sigmoid(), logits=logits)
    proposals = to_proposals(regions, sizes)
    assert [len(found) for found in proposals] == [2, 0, 1]
    back = from_proposals(proposals)
    assert back.boxes.equal(boxes)
    assert back.image_index.equal(regions.image_index)
    assert back.logits is not None
    assert back.logits.equal(logits)
    with pytest.raises(ValueError, match="no objectness"):
        to_proposals(Regions(boxes, torch.tensor([0, 0, 2])), sizes)


def test_a_class_without_a_name_is_refused() -> None:
    found = Instances(
        (4, 4),
        pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]])),
        scores=torch.tensor([0.5]),
        pred_classes=torch.tensor([3]),
    )
    with pytest.raises(ValueError, match="labels must be in"):
        from_instances(found, ["cat"])
