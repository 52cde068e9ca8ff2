"""Detection labels a folder of images, and another program's readers take the labels."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_base.storage.files import read_json
from regionclip.data.annotations import CocoDetection

Command = Callable[..., tuple[int, str]]
Box = tuple[str, str, tuple[float, ...]]


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """A folder of four images, one of them in a folder below."""
    folder = shutil.copytree(world / "images" / "val", tmp_path / "photos")
    first = min(folder.iterdir())
    (folder / "below").mkdir()
    first.rename(folder / "below" / first.name)
    return folder


@pytest.fixture
def options(detector_file: Path, tmp_path: Path) -> list[str]:
    out = f"out={tmp_path / 'found'}"
    return [f"weights={detector_file}", "vocabulary=cup, star", "resize.short=[64]", "resize.long=96", out]


def test_every_format_holds_the_detections_above_the_threshold(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    formats = "format=[coco,yolo,voc]"
    assert (
        regionclip("detect", f"{photos}/**/*.jpg", *options, formats, "draw=false", "score_threshold=0.1")[0]
        == 0
    )
    found = tmp_path / "found"
    wanted = sorted(
        (str(Path(entry["file_name"]).relative_to(photos)), entry["category_name"], _corners(entry["bbox"]))
        for entry in read_json(found / "detections.json")
        if entry["score"] >= 0.1
    )
    assert wanted
    for place in ("coco/instances.json", "yolo/labels", "voc/Annotations"):
        dataset = CocoDetection(found / place, photos)
        assert len(dataset) == 4, place
        boxes: list[Box] = sorted(
            (str(record.path.relative_to(photos)), dataset.categories[label], tuple(box))
            for record in dataset
            for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True)
        )
        assert [box[:2] for box in boxes] == [box[:2] for box in wanted], place
        # Rounding may change the order of boxes that begin at nearly the same place.
        for name, category, box in boxes:
            near = [one for one in wanted if one[:2] == (name, category)]
            assert any(box == pytest.approx(one[2], abs=0.05) for one in near), place


def _corners(box: list[float]) -> tuple[float, ...]:
    x, y, width, height = box
    return x, y, x + width, y + height


@pytest.mark.parametrize("count", [1, 2])
def test_tars_are_labeled_with_the_images_beside_the_labels(
    count: int, photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    files = sorted(photos.rglob("*.jpg"))
    tars = [tmp_path / f"part-{number}.tar" for number in range(count)]
    for number, tar in enumerate(tars):
        with tarfile.open(tar, "w") as packed:
            for file in files[number::count]:
                packed.add(file, f"sub/{file.name}")
    code, told = regionclip("detect", *tars, *options, "format=[yolo,voc]", "draw=false", "score_threshold=0")
    assert code == 0, told
    shutil.rmtree(photos)
    for place, folder in (("yolo/data.yaml", "images"), ("voc/Annotations", "JPEGImages")):
        beside = tmp_path / "found" / place.partition("/")[0] / folder
        dataset = CocoDetection(tmp_path / "found" / place, beside)
        assert len(dataset) == 4
        assert all(record.path.is_file() and len(record.boxes) for record in dataset)


def test_what_stands_in_the_way_is_said_before_the_first_image(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    (tmp_path / "found" / "yolo").mkdir(parents=True)
    (tmp_path / "found" / "yolo" / "mine.txt").write_text("keep me")
    code, told = regionclip("detect", photos, *options, "format=[yolo]")
    assert code == 2
    assert "is not empty and was not written by this job" in told
    assert not (tmp_path / "found" / "detections.json").exists()
    code, told = regionclip("detect", photos, *options, "format=[yollo]")
    assert code == 2
    assert "did you mean 'yolo'" in told


def test_a_video_is_not_labeled(photos: Path, options: list[str], regionclip: Command) -> None:
    (photos / "clip.mp4").write_bytes(b"")
    code, told = regionclip("detect", photos, *options, "format=[yolo]")
    assert code == 2
    assert "format= labels images" in told
