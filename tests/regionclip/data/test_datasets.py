"""Annotations in COCO's format: what is wrong is counted or named, and training never sees a novel box."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clip_base.images.decode import load_image
from clip_base.runtime.errors import InputError
from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import Split, load_split

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 9, "name": "umbrella"}]


def box(number: int, image: int, category: int, bbox: list[float], crowd: int = 0) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": crowd}


def image(number: int, **changed: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", "height": 40, "width": 60} | changed


def content(*boxes: dict[str, Any], images: int = 2) -> dict[str, Any]:
    return {
        "images": [image(number) for number in range(1, images + 1)],
        "annotations": list(boxes),
        "categories": CATEGORIES,
    }


def write(folder: Path, value: Any, pictures: int = 2) -> tuple[Path, Path]:
    for number in range(1, pictures + 1):
        Image.new("RGB", (60, 40)).save(folder / f"{number}.png")
    path = folder / "instances.json"
    path.write_text(json.dumps(value))
    return path, folder


def test_boxes_come_as_corners_with_labels_in_order_of_category_id(tmp_path: Path):
    found = content(
        box(1, 2, 3, [10, 5, 20, 10]), box(2, 2, 1, [0, 0, 5, 5]), box(3, 1, 9, [1, 1, 2, 2], crowd=1)
    )
    data = CocoDetection(*write(tmp_path, found))
    assert data.categories == ("cat", "dog", "umbrella")
    assert data.category_ids == (1, 3, 9)
    assert [record.image_id for record in data] == [1, 2]
    assert data[1].boxes.tolist() == [[10, 5, 30, 15], [0, 0, 5, 5]]
    assert data[1].boxes.dtype == torch.float32
    assert data[1].labels.tolist() == [1, 0]
    assert data[0].iscrowd.tolist() == [True]
    assert len(data.without_crowds()[0].boxes) == 0
    assert data.problems == {}
    assert data.report() == "2 images, 3 boxes in 3 categories"


def test_bad_boxes_are_left_out_and_counted(tmp_path: Path):
    found = content(
        box(1, 1, 1, [10, 5, 20, 10]),
        box(1, 1, 1, [10, 5, 20, 10]),
        box(1, 1, 1, [11, 5, 20, 10]),
        box(4, 1, 1, [10, 5, 0, 10]),
        box(5, 1, 1, [10, 5, 20, -1]),
        box(6, 1, 1, [100, 100, 20, 10]),
        box(7, 1, 1, [50, 30, 20, 20]),
        box(8, 1, 1, [50, 30, 10.4, 10]),
        box(9, 7, 1, [1, 1, 2, 2]),
        box(10, 1, 7, [1, 1, 2, 2]),
    )
    found["images"].append(image(2))
    data = CocoDetection(*write(tmp_path, found))
    assert data.problems == {
        "annotations that stand twice": 1,
        "boxes of no area": 2,
        "boxes outside their image": 1,
        "boxes cut at the image's edge": 1,
        "annotations of an unknown image": 1,
        "annotations of an unknown category": 1,
        "images listed twice": 1,
    }
    wanted = [[10, 5, 30, 15], [11, 5, 31, 15], [50, 30, 60, 40], [50, 30, 60, 40]]
    assert data[0].boxes.tolist() == wanted
    assert len(data[1].boxes) == 0


def test_restricted_data_hold_no_other_box(tmp_path: Path):
    found = content(box(1, 1, 3, [1, 1, 2, 2]), box(2, 1, 1, [5, 5, 2, 2]), box(3, 2, 9, [1, 1, 2, 2]))
    data = CocoDetection(*write(tmp_path, found))
    base = data.restrict(["dog", "cat"])
    assert base.categories == ("dog", "cat")
    assert base.category_ids == (3, 1)
    assert base[0].labels.tolist() == [0, 1]
    assert [len(record.boxes) for record in base] == [2, 0]
    assert [record.image_id for record in data.restrict(["umbrella"], keep_empty=False)] == [2]
    paths = write(tmp_path, found)
    same = CocoDetection(*paths, categories=["dog", "cat"], keep_empty=False)
    assert [record.image_id for record in same] == [1]
    assert data[0].labels.tolist() == [1, 0]
    with pytest.raises(InputError, match="did you mean 'umbrella'"):
        data.restrict(["umbrela"])
    with pytest.raises(InputError, match="'dog' given more than once"):
        data.restrict(["dog", "dog"])


def test_images_with_nothing_but_a_crowd_count_as_empty(tmp_path: Path):
    found = content(box(1, 1, 3, [1, 1, 2, 2], crowd=1), box(2, 2, 3, [1, 1, 2, 2]))
    assert [r.image_id for r in CocoDetection(*write(tmp_path, found), keep_empty=False)] == [2]


def test_missing_pictures_are_listed_and_left_out(tmp_path: Path):
    path, folder = write(tmp_path, content(box(1, 1, 3, [1, 1, 2, 2]), images=3), pictures=2)
    data = CocoDetection(path, folder)
    assert data.missing == [folder / "3.png"]
    assert data.problems == {"images whose file is missing": 1}
    assert len(data) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"none of the 3 images .*first: 1.png"):
        CocoDetection(path, empty)
    with pytest.raises(InputError, match=r"images folder .* does not exist"):
        CocoDetection(path, tmp_path / "nowhere")
    assert len(CocoDetection(path, None)) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "that is the form of a results file"),
        ({"images": [], "annotations": []}, "there is no 'categories'"),
        ({"images": {}, "annotations": [], "categories": []}, "'images' is a dict"),
        ({"images": [3], "annotations": [], "categories": []}, r"images\[0] is not an object"),
        (content() | {"images": [image(1), {"id": 2}]}, r"images\[1\] needs"),
        (content(box(1, 1, 1, [1, 2, 3, 4]), images=0), "lists no images"),
        (content() | {"images": [image(1), image(1, file_name="other.png")]}, "image id 1 is used for both"),
        (content() | {"categories": [{"id": "one", "name": "cat"}]}, r"categories\[0\] needs"),
        (
            content() | {"categories": [*CATEGORIES, {"id": 3, "name": "cow"}]},
            "is used for both 'dog' and 'cow'",
        ),
        (
            content() | {"categories": [*CATEGORIES, {"id": 4, "name": "dog"}]},
            "two categories are called 'dog'",
        ),
        (content(box(1, 1, 1, [1, 2, 3])), r"annotations\[0\] needs a 'bbox'"),
        (content(box(1, 1, 1, [1, 2, 3, float("nan")])), r"annotations\[0\] needs a 'bbox'"),
        (content({"id": 1, "image_id": 1, "category_id": 1}), r"annotations\[0\] needs a 'bbox'"),
        (
            content(box(1, 1, 1, [0, 0, 1, 1]), {"id": 2, "bbox": [0, 0, 1, 1]}),
            r"annotations\[1\] .*'image_id'",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_entry(tmp_path: Path, value: Any, message: str):
    path, folder = write(tmp_path, value)
    with pytest.raises(InputError, match=message) as error:
        CocoDetection(path, folder)
    assert "instances.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_lvis_pictures_are_found_by_their_url(tmp_path: Path):
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "train2017" / "9.png")
    entry = image(9, coco_url="http://images.cocodataset.org/train2017/9.png")
    del entry["file_name"]
    path, folder = write(tmp_path, content() | {"images": [entry]}, pictures=0)
    assert CocoDetection(path, folder)[0].path == tmp_path / "train2017" / "9.png"


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_pictures_of_any_mode_become_rgb(tmp_path: Path, mode: str):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (7, 5), (255, 255, 255)).convert(mode).save(path)
    pixels = load_image(path)
    assert pixels.shape == (3, 5, 7)
    assert pixels.dtype == torch.uint8
    assert pixels.min() > 240


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_unless_its_annotated_size_says_it_is_not(tmp_path: Path, orientation: int):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8))
    exif = stored.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    stored.save(path, exif=exif)
    raw = torch.from_numpy(np.asarray(stored).copy()).permute(2, 0, 1)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert torch.equal(load_image(path), raw)
    annotated = load_image(path, (5, 7)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(annotated, raw.permute(1, 2, 0) if orientation >= 5 else upright)
    np.testing.assert_array_equal(load_image(path, upright=True).permute(1, 2, 0).numpy(), upright)
    if orientation >= 5:
        np.testing.assert_array_equal(load_image(path, (7, 5)).permute(1, 2, 0).numpy(), upright)
    with pytest.raises(InputError, match="its annotations say 9x8"):
        load_image(path, (8, 9))


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"bad\.jpg"):
        load_image(tmp_path / "bad.jpg")


def test_the_coco_split_has_48_base_and_17_novel_names():
    names = [*load_names("coco80.txt")]
    split = load_split("coco", names)
    assert (len(split.base), len(split.novel), len(split.all)) == (48, 17, 65)
    assert not set(split.base) & set(split.novel)
    assert split.is_novel(["person", "umbrella"]) == [False, True]


def load_names(file: str) -> list[str]:
    text = (files("regionclip") / "data_files" / file).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_a_split_is_read_from_a_file_and_checked(tmp_path: Path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"base": ["cat"], "novel": ["dog"]}))
    assert load_split(path, ["dog", "cat", "cow"]) == Split(("cat",), ("dog",))
    with pytest.raises(InputError, match=r"1 of its 2 names are not among .*: 'dog'"):
        load_split(path, ["cat"])
    with pytest.raises(InputError, match="there is no split 'cocoo'"):
        load_split("cocoo", ["cat"])
    with pytest.raises(InputError, match="does not exist"):
        load_split(tmp_path / "nowhere.json", ["cat"])
    path.write_text(json.dumps({"base": "cat"}))
    with pytest.raises(InputError, match="must hold"):
        load_split(path, ["cat"])
    with pytest.raises(InputError, match="'cat' is both base and novel"):
        Split(("cat",), ("cat",))


def test_real_photographs_load_with_all_their_boxes(shared_data: Path):
    folder = shared_data / "coco_mini"
    data = CocoDetection(folder / "instances_train.json", folder / "train")
    assert len(data) == 400
    assert sum(len(record.boxes) for record in data) == 3749
    assert sum(int(record.iscrowd.sum()) for record in data) == 35
    split = load_split("coco", data.categories)
    base = data.without_crowds().restrict(split.base, keep_empty=False)
    novel_ids = {data.category_ids[data.categories.index(name)] for name in split.novel}
    assert not novel_ids & set(base.category_ids)
    assert all(len(record.boxes) for record in base)
    val = CocoDetection(folder / "instances_val.json", folder / "val")
    record = next(record for record in val if Image.open(record.path).mode == "L")
    pixels = load_image(record.path, (record.height, record.width))
    assert torch.equal(pixels[0], pixels[2])
