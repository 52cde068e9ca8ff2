"""Splits: made from COCO's, LVIS's and a user's own lists; what is novel never reaches training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip_base.jobs.cli import main_regionclip
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, write_json
from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import Split, load_split
from regionclip.structures.regions import RegionBatch
from regionclip.training.train_detector import DetectorTask
from regionclip.training.train_rpn import RPNTask

NAMES, OFTEN = ("cup", "sports_ball", "dog", "bow_(weapon)"), ("f", "r", "c", "r")


def test_in_lvis_rare_categories_are_novel_and_all_others_base():
    split = load_split("lvis", NAMES, OFTEN)
    assert split == Split(("cup", "dog"), ("sports_ball", "bow_(weapon)"))
    assert [split.competing(part) for part in ("base", "novel", "all")] == [
        split.base,
        split.novel,
        split.base + split.novel,
    ]


@pytest.mark.parametrize("often", [(), ("f", "r"), ("f", "r", "", "c"), ("f", "r", "x", "c")])
def test_categories_without_a_frequency_make_no_lvis_split(often: tuple[str, ...]):
    with pytest.raises(InputError, match=r"goes by the categories' `frequency`.* first '\w+'"):
        load_split("lvis", NAMES, often)


def test_lvis_v1_has_866_base_and_337_novel_categories(shared_data: Path, tmp_path: Path):
    categories = read_json(shared_data / "metadata" / "lvis_v1_train_cat_info.json")
    images = [{"id": 1, "file_name": "1.jpg", "height": 9, "width": 9}]
    write_json(tmp_path / "lvis.json", {"images": images, "annotations": [], "categories": categories})
    data = CocoDetection(tmp_path / "lvis.json", None)
    split = load_split("lvis", data.categories, data.frequencies)
    assert (len(split.base), len(split.novel)) == (866, 337)
    assert split.is_novel(["aerosol_can", "applesauce"]) == [False, True]


def test_a_users_lists_may_be_two_text_files_with_spaces_for_underscores(tmp_path: Path):
    base, novel = tmp_path / "base.txt", tmp_path / "novel.txt"
    base.write_text("# mine\ncup, mug\nsports ball\n")
    novel.write_text("dog\n")
    wanted = Split(("cup", "sports_ball"), ("dog",))
    assert load_split(f"{base},{novel}", NAMES) == wanted
    assert load_split(f"{base}, {novel}", NAMES) == wanted
    with pytest.raises(InputError, match=r"class list .*nowhere.txt does not exist"):
        load_split(f"{base},{tmp_path / 'nowhere.txt'}", NAMES)
    novel.write_text("dogg\n")
    with pytest.raises(InputError, match="did you mean 'dog'"):
        load_split(f"{base},{novel}", NAMES)
    novel.write_text("cup\n")
    with pytest.raises(InputError, match="'cup' is both base and novel"):
        load_split(f"{base},{novel}", NAMES)


def test_a_class_list_with_duplicates_is_refused(tmp_path: Path):
    base, novel = tmp_path / "base.txt", tmp_path / "novel.txt"
    base.write_text("cup\ndog\ncup\n")
    novel.write_text("sports_ball\n")
    with pytest.raises(InputError, match="'cup' is listed more than once; each name may occur once"):
        load_split(f"{base},{novel}", NAMES)


def test_the_published_class_files_of_coco_are_the_packaged_split(shared_data: Path, tmp_path: Path):
    folder = shared_data / "metadata"
    seen, unseen = (
        json.loads((folder / f"mscoco_{name}_classes.json").read_text()) for name in ("seen", "unseen")
    )
    base = tmp_path / "seen.json"
    base.write_text(json.dumps([name for name in seen if name != "background"]))
    data = CocoDetection(shared_data / "coco_mini" / "instances_val.json", None)
    split = load_split(f"{base},{folder / 'mscoco_unseen_classes.json'}", data.categories)
    published = load_split("coco", data.categories)
    assert len(unseen) == 17
    assert (set(split.base), set(split.novel)) == (set(published.base), set(published.novel))


@pytest.fixture
def lvis_world(world: Path, tmp_path: Path) -> tuple[Path, set[tuple[float, ...]], set[tuple[float, ...]]]:
    """The synthetic dataset as LVIS would hold it, and the boxes of its base and its rare categories."""
    content, novel = read_json(world / "instances_train.json"), read_json(world / "split.json")["novel"]
    for number, entry in enumerate(content["categories"]):
        entry["frequency"] = "r" if entry["name"] in novel else "fc"[number % 2]
    for entry in content["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/{entry.pop('file_name')}"
        entry |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    write_json(tmp_path / "lvis.json", content)
    rare = {entry["id"] for entry in content["categories"] if entry["frequency"] == "r"}
    boxes: tuple[set[tuple[float, ...]], set[tuple[float, ...]]] = (set(), set())
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        corners = tuple(round(side, 2) for side in (x, y, x + w, y + h))
        boxes[entry["category_id"] in rare].add(corners)
    return tmp_path / "lvis.json", *boxes


@pytest.mark.parametrize("job", ["train-detector", "train-rpn"])
def test_no_box_of_a_rare_category_reaches_training_on_lvis(
    job: str,
    lvis_world: tuple[Path, set[tuple[float, ...]], set[tuple[float, ...]]],
    world: Path,
    clip_file: Path,
    rpn_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    annotations, base, novel = lvis_world
    task: type[DetectorTask] | type[RPNTask] = DetectorTask if job == "train-detector" else RPNTask
    seen: set[tuple[float, ...]] = set()
    forward = task.forward

    def watched(self: torch.nn.Module, batch: RegionBatch) -> dict[str, Tensor]:
        seen.update(tuple(round(side, 2) for side in box) for box in batch.regions.boxes.tolist())
        return forward(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(task, "forward", watched)
    options = [
        f"annotations={annotations}",
        f"images={world / 'images'}",
        "split=lvis",
        f"out={tmp_path / 'out'}",
    ]
    options += ["resize.short=[64]", "resize.long=64", "resize.flip=false"]
    options += ["train.steps=6", "train.batch_size=4", "train.warmup_steps=0", "train.precision=fp32"]
    own = {
        "train-detector": [f"weights={clip_file}", f"rpn={rpn_file}", "max_proposals=20", "rois_per_image=8"],
        "train-rpn": [f"network.backbone_weights={clip_file}", "network.channels=16"],
    }
    assert main_regionclip([job, *options, *own[job]]) == 0
    assert novel - base
    assert seen <= base
    assert len(seen) > 5
