"""tools/prepare_coco.py says what is missing and makes the split from what is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "prepare_coco.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO's layout with two images and three categories, in small."""
    categories = [{"id": k, "name": name} for k, name in enumerate(["cat", "dog", "cow"], start=1)]
    for part in ("train", "val"):
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 9, "width": 9} for i in (1, 2, 3)]
        boxes = [
            {
                "id": i,
                "image_id": i,
                "category_id": i,
                "bbox": [0, 0, 5, 5],
                "segmentation": [[0, 0, 5, 5, 5, 0]],
            }
            for i in (1, 2, 3)
        ]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
        (tmp_path / "annotations" / f"captions_{part}2017.json").write_text("{}")
        (tmp_path / f"{part}2017").mkdir()
        for i in (1, 2, 3):
            (tmp_path / f"{part}2017" / f"{i}.jpg").touch()
    (tmp_path / "my.json").write_text(json.dumps({"base": ["cat"], "novel": ["dog"]}))
    return tmp_path


def test_the_split_is_made_from_a_whole_layout(root: Path):
    done = prepare("--root", root, "--split", root / "my.json")
    assert done.returncode == 0, done.stderr
    train = json.loads((root / "annotations" / "instances_train2017_base1.json").read_text())
    assert [entry["name"] for entry in train["categories"]] == ["cat"]
    assert [entry["category_id"] for entry in train["annotations"]] == [1]
    assert len(train["images"]) == 3
    assert "segmentation" not in train["annotations"][0]
    val = json.loads((root / "annotations" / "instances_val2017_2.json").read_text())
    assert [entry["category_id"] for entry in val["annotations"]] == [1, 2]
    assert [entry["id"] for entry in val["images"]] == [1, 2]
    assert json.loads((root / "annotations" / "split.json").read_text()) == {
        "base": ["cat"],
        "novel": ["dog"],
    }


def test_training_images_without_a_base_box_are_left_out_on_demand(root: Path):
    done = prepare("--root", root, "--split", root / "my.json", "--drop-empty")
    assert done.returncode == 0, done.stderr
    train = json.loads((root / "annotations" / "instances_train2017_base1.json").read_text())
    assert [entry["id"] for entry in train["images"]] == [1]


def test_what_is_missing_is_said_and_the_rest_is_made(root: Path):
    (root / "val2017" / "2.jpg").unlink()
    (root / "annotations" / "instances_train2017.json").unlink()
    done = prepare("--root", root, "--split", root / "my.json", "--masks")
    assert done.returncode == 1
    assert "instances_train2017.json (boxes; in http" in done.stderr
    assert "1 of 3 images in" in done.stderr
    val = json.loads((root / "annotations" / "instances_val2017_2.json").read_text())
    assert "segmentation" in val["annotations"][0]


def test_annotations_of_other_categories_are_a_bad_call_in_one_line(root: Path):
    done = prepare("--root", root)
    assert done.returncode == 2
    assert "not among the annotations' 3 categories" in done.stderr
    assert done.stderr.count("\n") == 1


def test_real_photographs_are_split(shared_data: Path, tmp_path: Path):
    names = [
        f"--{part}-{kind}={kind}_{part}.json"
        for part in ("train", "val")
        for kind in ("instances", "captions")
    ]
    folders = ["--train-images=train", "--val-images=val"]
    done = prepare("--root", shared_data / "coco_mini", *names, *folders, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    train = json.loads((tmp_path / "instances_train_base48.json").read_text())
    assert (len(train["images"]), len(train["categories"])) == (400, 48)
    assert len(json.loads((tmp_path / "instances_val_65.json").read_text())["categories"]) == 65
