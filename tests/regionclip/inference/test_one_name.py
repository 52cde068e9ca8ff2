"""Own words: a region is returned once, under its best name; as many boxes are drawn as can be told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regionclip as package
from clip_base.storage.files import read_json
from regionclip.inference import detect
from regionclip.structures.boxes import iou
from regionclip.structures.detections import Detections

NAMES = ["cup", "star", "gear", "umbrella"]
SMALL = ("resize.short=[64]", "resize.long=96", "precision=fp32")
Run = Callable[..., tuple[int, str]]


def per_box(found: list[dict[str, Any]]) -> Counter[tuple[float, ...]]:
    """Returns how often each box of each image is returned."""
    return Counter((entry["image_id"], *entry["bbox"]) for entry in found)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_region_is_returned_under_its_best_name_alone_unless_asked_otherwise(
    multi_label: bool, regionclip: Run, detector_file: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    words = [photos, f"weights={detector_file}", f"vocabulary={','.join(NAMES)}", f"out={out}", *SMALL]
    assert regionclip("detect", *words, f"multi_label={multi_label}")[0] == 0
    most = max(per_box(read_json(out / "detections.json")).values())
    assert most == 4 if multi_label else most == 1


def test_the_name_kept_is_the_best(detector_file: Path, photos: Path) -> None:
    image = min(photos.iterdir())
    every = package.load(detector_file, NAMES, precision="fp32", multi_label=True).detect(image)
    best = package.load(detector_file, NAMES, precision="fp32").detect(image)
    for box, score, label in zip(best.boxes, best.scores, best.labels, strict=True):
        same = (every.boxes == box).all(1)
        # Soft suppression lowers scores within a name: the best name is that of the highest score before it.
        assert same.any()
        assert float(score) >= 0
        assert int(label) in every.labels[same].tolist()
    assert len(best) < len(every)


def test_boxes_of_different_names_suppress_each_other_when_asked_to(
    regionclip: Run, detector_file: Path, photos: Path, tmp_path: Path
) -> None:
    def overlap(name: str, *options: str) -> float:
        out = tmp_path / name
        words = [photos, f"weights={detector_file}", f"vocabulary={','.join(NAMES)}", f"out={out}", *SMALL]
        assert regionclip("detect", *words, *options)[0] == 0
        found = read_json(out / "detections.json")
        first = [entry["bbox"] for entry in found if entry["image_id"] == 1]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in first])
        assert len(boxes) > 1
        return float((iou(boxes, boxes) - torch.eye(len(boxes))).max())

    assert overlap("within") > 0.53
    assert overlap("across", "nms_across_names=0.5") <= 0.51  # corners in the file are rounded


def test_with_nms_keeps_the_better_of_two_boxes_whatever_their_names() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    found = Detections(boxes, torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0, 1, 0]), ("a", "b"), (40, 40))
    kept = found.with_nms(0.5)
    assert kept.scores.tolist() == pytest.approx([0.9, 0.1])
    assert kept.labels.tolist() == [1, 0]
    assert len(found.with_nms(1)) == 3
    with pytest.raises(ValueError, match="threshold must be in"):
        found.with_nms(2)


def test_no_more_boxes_are_drawn_than_max_drawn(
    regionclip: Run, detector_file: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    paint = detect.draw

    def counting(pixels: Any, shown: Detections) -> Any:
        drawn.append(len(shown))
        assert shown.scores.tolist() == sorted(shown.scores.tolist(), reverse=True)
        return paint(pixels, shown)

    monkeypatch.setattr(detect, "draw", counting)
    out = tmp_path / "found"
    words = [photos, f"weights={detector_file}", "vocabulary=cup, star", f"out={out}", *SMALL]
    code, told = regionclip("detect", *words, "score_threshold=0", "max_drawn=3")
    assert code == 0
    assert drawn == [3] * 4
    assert told.count("show the 3 of the highest scores; the files have all") == 1
    assert len(read_json(out / "detections.json")) > 12
    drawn.clear()
    assert regionclip("detect", *words, "score_threshold=0", "max_drawn=0")[0] == 0
    assert min(drawn) > 3
