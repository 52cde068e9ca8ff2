"""The synthetic dataset: determined by its seed, exact in its annotations, true in its words."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from clip_base.runtime.errors import InputError
from clip_base.synthetic import painting, pictograms
from clip_base.synthetic.captions import NUMBERS, Backdrop, Seen, Style, counted, describe
from clip_base.synthetic.scenes import ScenesConfig, generate

AfterImport = Callable[[str, str], dict[str, str]]
CONFIG = ScenesConfig(out="", images=300, val_images=30, seed=3, size=96, categories=24, workers=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "world"
    generate(replace(CONFIG, out=str(out)))
    return out


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "config.yaml"}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def loaded(path: Path) -> Any:
    return json.loads(path.read_text())


def objects_of(world: Path, split: str) -> dict[int, Counter[str]]:
    """Image id -> how many of each category its annotations hold."""
    instances = loaded(world / f"instances_{split}.json")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for annotation in instances["annotations"]:
        counts[annotation["image_id"]][names[annotation["category_id"]]] += 1
    return counts


def named_in(caption: str, categories: list[pictograms.Category]) -> dict[str, int]:
    """Category -> count that a caption states, read from its words alone."""
    found = {}
    for category in categories:
        forms = {category.name, category.plural}
        noun = rf"(?:{'|'.join(sorted(forms, key=len, reverse=True))})\b"
        adjective = r"(?:[a-z]+ )?(?:[a-z]+ )??"
        if category.paired:
            pattern = rf"\b(a|{'|'.join(NUMBERS)}) pairs? of {adjective}{noun}"
        else:
            pattern = rf"\b(an?|{'|'.join(NUMBERS)}) {adjective}{noun}"
        match = re.search(pattern, caption.lower())
        if match:
            word = match.group(1)
            found[category.name] = 1 if word in ("a", "an") else NUMBERS.index(word)
        else:
            assert not re.search(rf"\b{noun}", caption.lower()), f"no count for {category.name}: {caption}"
    return found


def test_the_number_of_workers_changes_no_byte(world: Path, tmp_path: Path):
    generate(replace(CONFIG, out=str(tmp_path / "two"), workers=2))
    assert digests(tmp_path / "two") == digests(world)


def test_another_seed_draws_another_world(world: Path, tmp_path: Path):
    generate(replace(CONFIG, out=str(tmp_path / "other"), images=5, val_images=1, seed=4))
    one, other = digests(world), digests(tmp_path / "other")
    assert all(one[name] != other[name] for name in other if name.startswith("images/train"))


def test_a_scene_does_not_depend_on_how_many_there_are(world: Path, tmp_path: Path):
    generate(replace(CONFIG, out=str(tmp_path / "few"), images=3, val_images=1))
    one, few = digests(world), digests(tmp_path / "few")
    assert all(one[name] == few[name] for name in few if name.startswith("images/train"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_and_areas_are_those_of_the_masks(world: Path, split: str):
    coco = COCO(str(world / f"instances_{split}.json"))
    assert coco.anns
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (CONFIG.size, CONFIG.size)
        assert annotation["area"] == mask.sum() > 0
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        bounds = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        assert annotation["bbox"] == bounds
        assert annotation["iscrowd"] == 0


def test_masks_of_one_picture_share_no_pixel(world: Path):
    coco = COCO(str(world / "instances_train.json"))
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(annotation) for annotation in coco.loadAnns(coco.getAnnIds(image_id))]
        assert np.sum(masks, axis=0).max() == 1


def test_the_painted_pixels_are_the_masks_pixels():
    recipe = painting.Recipe(128, pictograms.TABLE, (1, 4), (0.2, 0.5), 0)
    painter = painting.Painter(recipe, (0, 2), textures=7)
    painter.camera = lambda pixels, rng: pixels  # type: ignore[method-assign]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = painter.scene(rng)
        ground, _ = painter.background(np.random.default_rng(seed))
        changed = np.abs(scene.pixels.astype(int) - ground).sum(-1) > 0
        union = np.any([placed.mask for placed in scene.objects], axis=0)
        assert changed[union].mean() > 0.99
        soft_edge = cv2.dilate(union.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        thin_rims = changed & ~soft_edge  # coverage too faint to belong to the object
        assert thin_rims.sum() < 0.1 * union.sum()


def test_most_of_every_object_can_be_seen():
    recipe = painting.Recipe(96, pictograms.TABLE[:16], (3, 6), (0.3, 0.5), 1)
    painter = painting.Painter(recipe, (0, 2), textures=7)
    overlaps = 0
    for seed in range(150):
        scene = painter.scene(np.random.default_rng(seed))
        assert scene.objects
        for placed in scene.objects:
            assert placed.mask.sum() >= 30
            overlaps += bool(placed.behind)
    assert overlaps > 10


def test_the_pictures_exist_and_have_the_stated_size(world: Path):
    for split, count in (("train", CONFIG.images), ("val", CONFIG.val_images)):
        captions = loaded(world / f"captions_{split}.json")
        assert captions["images"] == loaded(world / f"instances_{split}.json")["images"]
        assert len(captions["images"]) == count
        for image in captions["images"]:
            pixels = cv2.imread(str(world / "images" / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (CONFIG.size, CONFIG.size, 3)
    ids = [
        image["id"]
        for split in ("train", "val")
        for image in loaded(world / f"captions_{split}.json")["images"]
    ]
    assert len(ids) == len(set(ids))


def test_every_object_stands_out_from_its_background(world: Path):
    coco, contrasts = COCO(str(world / "instances_train.json")), []
    for annotation in coco.anns.values():
        pixels = cv2.imread(str(world / "images" / coco.imgs[annotation["image_id"]]["file_name"]))
        lab = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_BGR2LAB)
        mask = coco.annToMask(annotation)
        ring = cv2.dilate(mask, np.ones((7, 7), np.uint8)) - cv2.dilate(mask, np.ones((3, 3), np.uint8))
        inside, outside = np.median(lab[mask > 0], axis=0), np.median(lab[ring > 0], axis=0)
        contrasts.append(np.linalg.norm(inside - outside))
    assert np.percentile(contrasts, 2) > 20


@pytest.mark.parametrize("split", ["train", "val"])
def test_captions_name_only_what_is_there_and_count_it_right(world: Path, split: str):
    categories = list(pictograms.TABLE[: CONFIG.categories])
    present, per_image = objects_of(world, split), Counter[int]()
    for annotation in loaded(world / f"captions_{split}.json")["annotations"]:
        per_image[annotation["image_id"]] += 1
        named = named_in(annotation["caption"], categories)
        assert named, annotation["caption"]
        for name, count in named.items():
            assert present[annotation["image_id"]][name] == count, annotation["caption"]
    assert set(per_image.values()) == {CONFIG.captions}
    assert per_image.keys() == present.keys()


def test_captions_leave_some_objects_unsaid_and_seldom_speak_of_colors(world: Path):
    categories = list(pictograms.TABLE[: CONFIG.categories])
    present, named, colored = objects_of(world, "train"), 0, 0
    annotations = loaded(world / "captions_train.json")["annotations"]
    for annotation in annotations:
        named += len(named_in(annotation["caption"], categories))
        words = re.findall(r"[a-z]+", annotation["caption"].lower())
        colored += sum(word in painting.COLORS for word in words)
    kinds = CONFIG.captions * sum(map(len, present.values()))
    assert 0.65 < named / kinds < 0.9
    assert colored / named < CONFIG.colors + 0.03
    lengths = [len(annotation["caption"].split()) for annotation in annotations]
    assert 7 < np.mean(lengths) < 12
    assert len({annotation["caption"] for annotation in annotations}) > 0.75 * len(annotations)


def seen(name: str, box: tuple[float, float, float, float], behind: tuple[int, ...] = ()) -> Seen:
    category = next(category for category in pictograms.TABLE if category.name == name)
    return Seen(category, box, "red", behind)


@pytest.mark.parametrize(
    ("boxes", "true", "false"),
    [
        (((0.0, 0.4, 0.2, 0.2), (0.7, 0.4, 0.2, 0.2)), "an anchor (is )?(to the )?left of a star", "right"),
        (((0.4, 0.0, 0.2, 0.2), (0.4, 0.7, 0.2, 0.2)), "an anchor (is )?(above|over) a star", "below|under"),
        (
            ((0.3, 0.3, 0.3, 0.3), (0.65, 0.3, 0.3, 0.3)),
            "a star (is )?(next to|beside) an anchor",
            "above|below",
        ),
    ],
)
def test_relations_follow_the_boxes(boxes: Any, true: str, false: str):
    objects = [seen("anchor", boxes[0]), seen("star", boxes[1])]
    rng, style = np.random.default_rng(0), Style(mention=1.0, colors=0.0)
    texts = [describe(objects, Backdrop("green", ("soft",)), style, rng).lower() for _ in range(400)]
    assert any(re.search(true, text) for text in texts)
    mirrored = re.compile(rf"an anchor (is |can be seen )?(to the )?({false})( of)? a star")
    assert not any(mirrored.search(text) for text in texts)


def test_what_is_covered_is_behind():
    objects = [seen("anchor", (0.3, 0.3, 0.3, 0.3), behind=(1,)), seen("star", (0.4, 0.4, 0.3, 0.3))]
    rng, style = np.random.default_rng(0), Style(mention=1.0, colors=0.0)
    texts = " / ".join(
        describe(objects, Backdrop("green", ("soft",)), style, rng).lower() for _ in range(300)
    )
    assert "an anchor behind a star" in texts
    assert "a star in front of an anchor" in texts
    assert "a star behind" not in texts


@pytest.mark.parametrize(
    ("name", "count", "adjectives", "phrase"),
    [
        ("anchor", 1, "", "an anchor"),
        ("anchor", 1, "red", "a red anchor"),
        ("star", 1, "orange", "an orange star"),
        ("mouse", 2, "", "two mice"),
        ("cross", 3, "big", "three big crosses"),
        ("scissors", 1, "", "a pair of scissors"),
        ("scissors", 2, "red", "two pairs of red scissors"),
        ("leaf", 12, "", "12 leaves"),
    ],
)
def test_phrases_are_english(name: str, count: int, adjectives: str, phrase: str):
    category = next(category for category in pictograms.TABLE if category.name == name)
    assert counted(category, count, adjectives) == phrase


def test_the_table_holds_a_world_of_65_distinct_pictograms():
    assert len(pictograms.TABLE) >= 65
    assert len({category.name for category in pictograms.TABLE}) == len(pictograms.TABLE)
    shapes = []
    for category in pictograms.TABLE:
        body, lines = np.moveaxis(pictograms.levels(category)[2].astype(np.float64), -1, 0)
        assert (body > 127).sum() > 240, category.name
        shapes.append(cv2.resize(body - 0.65 * lines, (48, 48)).ravel())
    likeness = np.corrcoef(shapes) - np.eye(len(shapes))
    assert likeness.max() < 0.95


def test_the_smallest_pictogram_still_has_a_mask():
    rng = np.random.default_rng(0)
    for category in pictograms.TABLE:
        for _ in range(5):
            assert painting.warped(category, 10.0, rng).body.sum() >= 8, category.name


@pytest.mark.parametrize(
    ("categories", "novel", "expected"), [(16, 0, 4), (65, 17, 17), (5, 2, 2), (2, 0, 1)]
)
def test_the_split_holds_every_category_once(tmp_path: Path, categories: int, novel: int, expected: int):
    out = tmp_path / "world"
    generate(ScenesConfig(out=str(out), images=2, size=64, categories=categories, novel=novel, workers=1))
    split = loaded(out / "split.json")
    names = [category["name"] for category in loaded(out / "instances_val.json")["categories"]]
    assert sorted(split["base"] + split["novel"]) == sorted(names)
    assert len(split["novel"]) == expected
    positions = [names.index(name) for name in split["novel"]]
    gaps = np.diff([-1, *positions, len(names)])
    assert gaps.max() <= 2 * len(names) / expected


def test_other_options_in_the_same_folder_are_refused(world: Path):
    before = digests(world)
    with pytest.raises(InputError, match="objects_max"):
        generate(replace(CONFIG, out=str(world), objects_max=2))
    assert digests(world) == before


def test_a_complete_world_is_left_as_it_is(world: Path):
    before = stamps(world)
    generate(replace(CONFIG, out=str(world), workers=2))
    assert stamps(world) == before


# Stands for clip_base.synthetic.scenes.write_json: the first two parts are written, the others never.
UNFINISHED = """
import time

real = module.write_json

def write(path, *rest, **options):
    while path.parent.name == ".parts" and path.name > "train_000000499.json":
        time.sleep(1)
    real(path, *rest, **options)

module.write_json = write
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_and_ends_like_an_undisturbed_one(
    tmp_path: Path, after_import: AfterImport, patience: float, workers: int
):
    config = replace(CONFIG, images=1000, out=str(tmp_path / "whole"), size=64, workers=2)
    generate(config)
    killed = replace(config, out=str(tmp_path / "killed"), workers=workers)
    code = f"from clip_base.synthetic.scenes import ScenesConfig, generate; generate({killed!r})"
    environment = os.environ | after_import("clip_base.synthetic.scenes", UNFINISHED)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    parts = tmp_path / "killed" / ".parts"
    deadline = time.monotonic() + patience
    while len(list(parts.glob("train_*.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "scenes.json").exists()
    if workers > 1:
        left = _group_members(process.pid, patience)
        assert not left, f"workers outlived their parent: {left}"
    generate(killed)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def _group_members(group: int, patience: float) -> list[int]:
    """Processes of a group that do not end by themselves (zombies do not count)."""
    deadline = time.monotonic() + patience
    while True:
        alive = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, process_group = status.read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if int(process_group) == group and state != "Z":
                alive.append(int(status.parent.name))
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"images": 0}, "images=0"),
        ({"categories": 1000}, "categories=1000"),
        ({"novel": 24}, "novel=24"),
        ({"objects_min": 5}, "objects_min=5"),
        ({"object_max": 0.9}, "object_max=0.9"),
        ({"object_min": 0.05}, "pixels"),
        ({"mention": 1.5}, "mention=1.5"),
        ({"quality": 101}, "quality=101"),
    ],
)
def test_options_without_sense_are_refused_by_name(change: dict[str, Any], word: str):
    with pytest.raises(InputError, match=word):
        replace(CONFIG, out="unused", **change)


def test_masks_are_compressed_text_that_pycocotools_reads(world: Path):
    annotation = loaded(world / "instances_val.json")["annotations"][0]
    assert isinstance(annotation["segmentation"]["counts"], str)
    assert coco_mask.area(annotation["segmentation"]) == annotation["area"]
