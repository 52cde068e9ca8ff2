"""tools/prepare_lvis.py leaves no rare box for training and says what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "prepare_lvis.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """LVIS's layout in small; as there, a validation image lies among COCO's training images."""
    categories = [{"id": k, "name": f"c{k}", "frequency": letter} for k, letter in enumerate("fcr", start=1)]
    urls = {1: "train2017/1.jpg", 2: "train2017/2.jpg", 3: "val2017/3.jpg"}
    images = [
        {"id": number, "coco_url": f"http://images.cocodataset.org/{url}", "height": 9, "width": 9}
        | {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
        for number, url in urls.items()
    ]
    boxes = [
        {"id": k, "image_id": k, "category_id": k, "bbox": [0, 0, 5, 5], "segmentation": [[0, 0, 5, 5, 5, 0]]}
        for k in (1, 2, 3)
    ]
    content = {"images": images, "annotations": boxes, "categories": categories}
    for part in ("train", "val"):
        (tmp_path / f"lvis_v1_{part}.json").write_text(json.dumps(content))
        (tmp_path / f"{part}2017").mkdir()
    for url in urls.values():
        (tmp_path / url).touch()
    return tmp_path


@pytest.mark.parametrize("empty", ["keep", "drop"])
def test_training_gets_no_rare_box(root: Path, empty: str):
    done = prepare("--root", root, "--images", root, *(["--drop-empty"] if empty == "drop" else []))
    assert done.returncode == 0, done.stderr
    train = json.loads((root / "lvis_v1_train_base2.json").read_text())
    assert [entry["frequency"] for entry in train["categories"]] == ["f", "c"]
    assert [entry["category_id"] for entry in train["annotations"]] == [1, 2]
    assert "segmentation" not in train["annotations"][0]
    assert [entry["id"] for entry in train["images"]] == ([1, 2, 3] if empty == "keep" else [1, 2])
    assert train["images"][0]["neg_category_ids"] == [1]
    assert json.loads((root / "split.json").read_text()) == {"base": ["c1", "c2"], "novel": ["c3"]}


def test_what_is_missing_is_said_and_the_rest_is_made(root: Path):
    (root / "train2017" / "2.jpg").unlink()
    (root / "lvis_v1_val.json").unlink()
    done = prepare("--root", root, "--images", root)
    assert done.returncode == 1
    assert "lvis_v1_val.json (http" in done.stderr
    assert "1 of 2 images in" in done.stderr
    assert (root / "lvis_v1_train_base2.json").exists()


def test_cocos_own_annotations_are_a_bad_call_in_one_line(root: Path):
    text = (root / "lvis_v1_train.json").read_text().replace("frequency", "often")
    (root / "lvis_v1_train.json").write_text(text)
    done = prepare("--root", root, "--images", root)
    assert done.returncode == 2
    assert "goes by the categories' `frequency`" in done.stderr
    assert done.stderr.count("\n") == 1
