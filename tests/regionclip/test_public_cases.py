"""Reports from public trackers, each tried on this code; `tests/README.md` lists all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.storage.files import read_json, write_json

Command = Callable[..., tuple[int, str]]
Figures = Callable[[dict[str, Any], list[dict[str, Any]]], dict[str, float]]


@pytest.fixture
def truth(world: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(world / "instances_train.json")
    return content


@pytest.fixture
def figures(regionclip: Command, tmp_path: Path) -> Figures:
    """Evaluates results by annotations."""
    count = iter(range(9))

    def measure(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
        place = tmp_path / str(next(count))
        write_json(place / "truth.json", truth)
        write_json(place / "results.json", results)
        given = [f"annotations={place / 'truth.json'}", f"results={place / 'results.json'}", "report=false"]
        code, told = regionclip("evaluate", *given, f"out={place / 'out'}")
        assert code == 0, told
        metrics: dict[str, float] = read_json(place / "out" / "metrics.json")
        return metrics

    return measure


def results_of(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Perfect detections, every third one of them some pixels beside."""
    found = []
    for place, entry in enumerate(truth["annotations"]):
        x, y, width, height = entry["bbox"]
        box = [x + (place % 3 == 0) * width / 4, y, width, height]
        scores = {"score": 0.9 - place / 1000}
        found.append(
            {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": box} | scores
        )
    return found


def test_annotations_numbered_from_0_are_all_found(truth: dict[str, Any], figures: Figures) -> None:
    """cvat-ai/cvat#748, pytorch/vision#1530: pycocotools takes a match with annotation 0 for none."""
    perfect = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for entry in truth["annotations"]
    ]
    for place, entry in enumerate(truth["annotations"]):
        entry["id"] = place
    assert figures(truth, perfect)["AP"] == 1


def test_annotations_of_one_id_are_all_counted(truth: dict[str, Any], figures: Figures) -> None:
    """cocodataset/cocoapi#600: pycocotools keeps the last of them."""
    results = results_of(truth)
    wanted = figures(truth, results)
    for entry in truth["annotations"]:
        entry["id"] = 1
    assert figures(truth, results) == wanted
    assert 0 < wanted["AP"] < 1


def test_categories_and_images_numbered_from_0(truth: dict[str, Any], figures: Figures) -> None:
    """roboflow/supervision#176, PaddlePaddle/PaddleDetection#1457: category 0 was lost or background."""
    wanted = figures(truth, results_of(truth))
    moved = json.loads(json.dumps(truth))
    category = {entry["id"]: place for place, entry in enumerate(moved["categories"])}
    image = {entry["id"]: place for place, entry in enumerate(moved["images"])}
    for entry in moved["categories"]:
        entry["id"] = category[entry["id"]]
    for entry in moved["images"]:
        entry["id"] = image[entry["id"]]
    for entry in moved["annotations"]:
        entry |= {"category_id": category[entry["category_id"]], "image_id": image[entry["image_id"]]}
    assert figures(moved, results_of(moved)) == wanted


def test_detections_in_images_without_objects_count_as_wrong(truth: dict[str, Any], figures: Figures) -> None:
    """HumanSignal/label-studio-converter#171, pylabel-project/pylabel#44: such images were left out."""
    first = truth["images"][0]["id"]
    others = [entry for entry in truth["annotations"] if entry["image_id"] != first]
    kept = [entry for entry in results_of(truth) if entry["image_id"] != first]
    without = {**truth, "annotations": others}
    assert figures(without, results_of(truth))["AP"] < figures(without, kept)["AP"]


def test_white_space_around_category_names_is_none_of_the_name(
    truth: dict[str, Any], figures: Figures, world: Path, regionclip: Command, tmp_path: Path
) -> None:
    """facebookresearch/detectron2#4655: a class list that differs in its spelling is another one."""
    for entry in truth["categories"]:
        entry["name"] = f"  {entry['name']} "
    write_json(tmp_path / "truth.json", truth)
    write_json(tmp_path / "results.json", results_of(truth))
    given = [f"annotations={tmp_path / 'truth.json'}", f"results={tmp_path / 'results.json'}"]
    code, told = regionclip(
        "evaluate", *given, f"split={world / 'split.json'}", "report=false", f"out={tmp_path / 'out'}"
    )
    assert code == 0, told
    assert "AP50_novel" in read_json(tmp_path / "out" / "metrics.json")


def test_the_order_of_the_names_changes_no_detection(
    world: Path, detector_file: Path, regionclip: Command, tmp_path: Path
) -> None:
    """IDEA-Research/GroundingDINO#395: the same words in another order gave other boxes."""
    found = []
    for number, names in enumerate(("cup, star, dog", "dog, cup, star")):
        out = tmp_path / str(number)
        given = [f"weights={detector_file}", f"vocabulary={names}", "draw=false", "precision=fp32"]
        assert regionclip("detect", world / "images" / "train", *given, f"out={out}")[0] == 0
        entries = read_json(out / "detections.json")
        found.append(
            {
                (entry["file_name"], entry["category_name"], *entry["bbox"]): entry["score"]
                for entry in entries
            }
        )
    assert found[0]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_boxes_thinner_than_a_pixel_train_to_finite_losses(
    truth: dict[str, Any], world: Path, clip_file: Path, regionclip: Command, tmp_path: Path
) -> None:
    """facebookresearch/maskrcnn-benchmark#31: boxes of less than a pixel ended training."""
    for entry in truth["annotations"]:
        entry["bbox"][2] = 0.3
    write_json(tmp_path / "truth.json", truth)
    given = [f"annotations={tmp_path / 'truth.json'}", f"images={world / 'images'}"]
    train = ["train.steps=2", "train.batch_size=2", "train.precision=fp32", f"split={world / 'split.json'}"]
    sizes = ["resize.short=[64]", "resize.long=64", f"network.backbone_weights={clip_file}"]
    code, told = regionclip("train-rpn", *given, *train, *sizes, f"out={tmp_path / 'out'}")
    assert code == 0, told
    assert read_json(tmp_path / "out" / "metrics.json")["loss"] > 0
