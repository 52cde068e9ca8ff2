"""Detections refuse what does not fit, and lose nothing when filtered, drawn, written and handed on."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_base.runtime.errors import InputError
from regionclip.structures.detections import Detections

NAMES = ("cat", "dog", "umbrella")
SIZE = (300, 400)


def detections() -> Detections:
    boxes = torch.tensor([[0.0, 1, 10, 21], [5, 5, 30.25, 40.5], [1, 2, 3, 4]])
    return Detections(boxes, torch.tensor([0.9, 0.2, 0.5]), torch.tensor([1, 0, 1]), NAMES, (48, 64))


def large(*boxes: list[float]) -> Detections:
    """Dogs, in an image large enough that it is not enlarged."""
    count = len(boxes)
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Detections(corners, torch.full((count,), 0.5), torch.ones(count, dtype=torch.int64), NAMES, SIZE)


def test_detections_survive_cocos_form():
    found = detections()
    entries = found.to_coco(42, [17, 18, 28])
    assert entries[1] == {
        "image_id": 42,
        "category_id": 17,
        "bbox": [5, 5, 25.25, 35.5],
        "score": pytest.approx(0.2),
    }
    back = Detections.from_coco(entries, [17, 18, 28], NAMES, (48, 64))
    torch.testing.assert_close(back.boxes, found.boxes)
    assert torch.equal(back.scores, found.scores)
    assert torch.equal(back.labels, found.labels)
    assert len(Detections.from_coco([], [17, 18, 28], NAMES, (48, 64))) == 0
    with pytest.raises(ValueError, match=r"category ids \[17, 18\] have no name"):
        Detections.from_coco(entries, [1, 2, 3], NAMES, (48, 64))


def test_detections_read_as_text():
    assert repr(detections()) == "Detections(3 in 64x48: dog 0.90, dog 0.50, cat 0.20)"
    assert repr(detections().with_min_score(0.95)) == "Detections(0 in 64x48: nothing found)"


def test_above_keeps_what_scores_at_least_as_much():
    assert detections().with_min_score(0.5).scores.tolist() == pytest.approx([0.9, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.tensor([0.1, 1.2, 0.3])}, r"scores must be in \[0, 1\]"),
        ({"scores": torch.tensor([0.1, torch.nan, 0.3])}, r"scores must be in \[0, 1\]"),
        ({"labels": torch.tensor([0, 3, 1])}, "labels must be in 0…2"),
        ({"boxes": torch.full((3, 4), torch.inf)}, "NaN or infinite"),
        ({"names": list(NAMES)}, "tuple"),
    ],
)
def test_detections_that_do_not_fit_are_refused(change: dict[str, object], message: str):
    whole = detections()
    columns = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Detections(**(columns | change))


@pytest.mark.parametrize(
    "which",
    [
        torch.tensor([True, False, True]),
        np.array([True, False, True]),
        torch.tensor([0, 2]),
        [0, 2],
        slice(0, 3, 2),
    ],
)
def test_a_mask_indices_and_a_slice_pick_the_same(which: object):
    picked = detections()[which]  # type: ignore[index]
    assert picked.class_names == ["dog", "dog"]
    assert picked.scores.tolist() == pytest.approx([0.9, 0.5])
    assert len(detections()[[]]) == 0


def test_a_loop_goes_over_each_detection_once():
    assert [(one.class_names, len(one)) for one in detections()] == [(["dog"], 1), (["cat"], 1), (["dog"], 1)]
    with pytest.raises(IndexError, match="no row 3 of 3"):
        detections()[3]


def test_filters_go_together_and_keep_the_rest():
    found = detections().with_min_score(0.3).with_classes("dog", "umbrella").top(1)
    assert found.to_dicts() == [{"name": "dog", "score": 0.9, "box": [0, 1, 10, 21]}]
    assert (found.names, found.size) == (NAMES, (48, 64))
    assert detections().with_classes("cat").class_names == ["cat"]
    assert detections().top(9).scores.tolist() == pytest.approx([0.9, 0.5, 0.2])
    assert not len(detections().with_classes()) + len(detections().top(0))


def test_filters_refuse_what_makes_no_sense():
    with pytest.raises(InputError, match=r"'dgo' is not in the vocabulary; did you mean 'dog'\?"):
        detections().with_classes("dgo")
    with pytest.raises(InputError, match="got 50"):
        detections().with_min_score(50)
    with pytest.raises(ValueError, match="-1"):
        detections().top(-1)


def test_at_another_size_the_boxes_cover_the_same_share():
    twice = detections().resized((96, 128))
    assert (twice.boxes[1].tolist(), twice.size) == ([10, 10, 60.5, 81], (96, 128))


def corner_colors(drawn: Image.Image) -> set[object]:
    return {drawn.getpixel(corner) for corner in ((50, 60), (200, 60), (50, 250), (200, 250))}


@pytest.mark.parametrize("kind", ["path", "PIL", "array", "tensor", "float tensor"])
def test_boxes_are_drawn_on_every_kind_of_picture(kind: str, tmp_path: Path):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    images = {
        "path": str(tmp_path / "photo.png"),
        "PIL": Image.fromarray(pixels),
        "array": pixels,
        "tensor": tensor,
        "float tensor": tensor / 255,
    }
    drawn = large([50, 60, 200, 250]).plot(images[kind])  # type: ignore[arg-type]
    assert isinstance(drawn, Image.Image)
    assert drawn.size == (400, 300)
    assert len(corner_colors(drawn)) == 1
    assert corner_colors(drawn) != {(0, 0, 0)}


def test_a_picture_that_was_reduced_has_its_boxes_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = large([100, 120, 400, 500]).resized((600, 800))
    assert found.boxes.tolist() == [[200, 240, 800, 1000]]
    found = Detections(found.boxes / 2, found.scores, found.labels, NAMES, (600, 800))
    on_whole = found.plot(np.zeros((600, 800, 3), np.uint8)).resize((400, 300))
    on_half = found.plot(np.zeros((300, 400, 3), np.uint8))
    assert on_half.getpixel((50, 150)) == on_half.getpixel((200, 200))
    assert on_half.getpixel((100, 61)) != (0, 0, 0) != on_whole.getpixel((100, 61))
    Image.new("RGB", (800, 600)).save(tmp_path / "photo.png")
    monkeypatch.setattr("clip_base.images.inputs.LARGE", 400 * 300)
    assert found.plot(tmp_path / "photo.png").tobytes() == on_half.tobytes()


def test_a_picture_of_another_shape_is_refused():
    with pytest.raises(InputError, match="of 400x300 pixels, this one has 300x400"):
        large([1, 2, 30, 40]).plot(Image.new("RGB", (300, 400)))


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "webp"])
def test_saved_as_a_picture_it_is_the_plot(ending: str, tmp_path: Path):
    found, image = large([50, 60, 200, 250]), Image.new("RGB", (400, 300), (90, 90, 90))
    path = tmp_path / "new" / f"found.{ending}"
    found.save(path, image)
    saved, plot = (np.asarray(one.convert("RGB"), dtype=int) for one in (Image.open(path), found.plot(image)))
    assert abs(saved - plot).mean() < 3
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saved_as_json_and_csv_it_holds_what_was_found(tmp_path: Path):
    found = detections()
    found.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == found.to_dicts()
    found.save(tmp_path / "found.csv")
    with (tmp_path / "found.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert rows[1] == {"name": "cat", "score": "0.2", "x1": "5.0", "y1": "5.0", "x2": "30.25", "y2": "40.5"}
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("name", "image", "told"),
    [
        ("found.txt", None, r"must end in \.json, \.csv"),
        ("found", None, r"must end in \.json, \.csv"),
        ("found.jpg", None, "give image="),
        ("found.csv", Image.new("RGB", (64, 48)), "leave image= out"),
    ],
)
def test_what_cannot_be_saved_is_said(name: str, image: Image.Image | None, told: str, tmp_path: Path):
    with pytest.raises(InputError, match=told):
        detections().save(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "found.png"
    path.write_text("old")

    def fill_the_disk(picture: Image.Image, file: Path, **options: object) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        detections().save(path, Image.new("RGB", (64, 48)))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_supervision_gets_boxes_scores_and_names():
    supervision = pytest.importorskip("supervision")
    found = detections()
    given = found.to_supervision()
    assert given.xyxy.tolist() == found.boxes.tolist()
    assert given.confidence.tolist() == found.scores.tolist()
    assert given.class_id.tolist() == [1, 0, 1]
    assert given.data["class_name"].tolist() == ["dog", "cat", "dog"]
    assert given[given.confidence > 0.6]["class_name"].tolist() == ["dog"]
    scene = np.zeros((48, 64, 3), np.uint8)
    assert supervision.BoxAnnotator().annotate(scene.copy(), given).any()
    labels = supervision.LabelAnnotator().annotate(scene.copy(), given)
    assert labels.any()
    given.xyxy[:] = 0
    assert found.boxes.any()


def test_supervision_gets_nothing_found_as_nothing():
    supervision = pytest.importorskip("supervision")
    empty = detections().top(0).to_supervision()
    assert empty.is_empty()
    assert (len(empty), empty.xyxy.shape) == (0, (0, 4))
    merged = supervision.Detections.merge([empty, detections().to_supervision()])
    assert merged.data["class_name"].tolist() == ["dog", "cat", "dog"]


def test_without_supervision_it_is_said_what_brings_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match=r"pip install 'regionclip\[supervision\]'"):
        detections().to_supervision()
