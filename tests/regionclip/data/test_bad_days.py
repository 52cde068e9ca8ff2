"""Bad days: each job names what is wrong and where, or handles it and counts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from clip_base.storage.files import read_json, write_json, write_text

Content = dict[str, Any]
Options = dict[str, object]
Command = Callable[[str, Options, Path], tuple[int, str, str]]
MakeOptions = Callable[..., Options]
Swap = Callable[..., list[str]]

SMALL: Options = {"resize.short": "[64]", "resize.long": 64}
TRAINING = ["train-rpn", "train-detector"]
ANNOTATED = [*TRAINING, "propose", "evaluate", "features"]


def one_line(told: str) -> bool:
    return told.startswith("error: ") and told.count("\n") == 1


def no_images(content: Content) -> None:
    content["images"] = []


def an_image_id_of_two_pictures(content: Content) -> None:
    content["images"][1]["id"] = content["images"][0]["id"]


def a_category_id_of_two_names(content: Content) -> None:
    content["categories"][1]["id"] = content["categories"][0]["id"]


def two_categories_of_one_name(content: Content) -> None:
    content["categories"][1]["name"] = content["categories"][0]["name"]


def a_box_of_no_number(content: Content) -> None:
    content["annotations"][3]["bbox"][2] = float("nan")


CONTRADICTIONS: dict[Callable[[Content], None], str] = {
    no_images: "lists no images",
    an_image_id_of_two_pictures: "image id 1 is used for both train/000000000001.jpg and train/",
    a_category_id_of_two_names: "category id 1 is used for both 'airplane' and",
    two_categories_of_one_name: "two categories are called 'airplane'",
    a_box_of_no_number: "annotations[3] needs a 'bbox' of four finite numbers",
}


@pytest.mark.parametrize("damage", CONTRADICTIONS, ids=lambda damage: str(damage.__name__))
@pytest.mark.parametrize("job", ANNOTATED)
def test_annotations_that_contradict_themselves_are_refused_with_file_and_entry(
    job: str,
    damage: Callable[[Content], None],
    content: Content,
    options_for: MakeOptions,
    call: Command,
    tmp_path: Path,
) -> None:
    damage(content)
    code, _, told = call(job, options_for(job, content), tmp_path / "out")
    assert code == 2
    assert one_line(told), told
    assert "given.json" in told
    assert CONTRADICTIONS[damage] in told
    assert not (tmp_path / "out" / "metrics.json").exists()


PROBLEMS = [
    "1 images listed twice",
    "1 annotations that stand twice",
    "2 boxes of no area",
    "1 boxes outside their image",
    "1 boxes cut at the image's edge",
    "1 annotations of an unknown image",
    "1 annotations of an unknown category",
]


def with_problems(content: Content) -> tuple[Content, int]:
    """Adds entries with PROBLEMS to annotations; returns them and how many usable boxes there are."""
    good = content["annotations"]
    changes = [
        {"id": good[0]["id"]},
        {"bbox": [5, 5, 0, 10]},
        {"bbox": [20, 20, -5, -10]},
        {"bbox": [500, 500, 10, 10]},
        {"bbox": [40, 40, 100, 100]},
        {"image_id": 999},
        {"category_id": 999},
    ]
    added = [{**good[0], "id": 1000 + place, **change} for place, change in enumerate(changes)]
    images = [*content["images"], content["images"][0]]
    return {**content, "images": images, "annotations": good + added}, len(good) + 1  # the one that was cut


@pytest.mark.parametrize("job", ANNOTATED)
def test_boxes_and_ids_that_cannot_be_used_are_left_out_and_counted(
    job: str, content: Content, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    damaged, usable = with_problems(content)
    options = options_for(job, damaged)
    code, printed, _ = call(job, options, tmp_path / "out")
    assert code == 0
    assert all(problem in printed for problem in PROBLEMS), printed
    if job not in TRAINING:  # those see base classes only
        assert f"12 images, {usable} boxes" in printed


@pytest.mark.parametrize("job", TRAINING)
def test_without_a_base_box_training_names_the_file_and_the_way_out(
    job: str, content: Content, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    options = options_for(job, {**content, "annotations": []})
    code, printed, told = call(job, options, tmp_path / "out")
    assert code == 2
    assert one_line(told), told
    assert "given.json has a usable box of the 12 base classes; keep_empty=true" in told
    assert "0 images, 0 boxes in 12 categories" in printed


@pytest.mark.parametrize(
    ("job", "figures"),
    [
        ("train-rpn", {"images": 12}),
        ("propose", {"images": 12, "skipped": 0}),
        ("evaluate", {"images": 12, "skipped": 0, "AP": -1.0}),
        ("features", {"images": 12, "regions": 0}),
    ],
)
def test_images_without_any_box_are_worked_on_and_counted(
    job: str,
    figures: dict[str, float],
    content: Content,
    options_for: MakeOptions,
    call: Command,
    tmp_path: Path,
) -> None:
    options = options_for(job, {**content, "annotations": []})
    kept = {"keep_empty": "true"} if job == "train-rpn" else {}
    assert call(job, {**options, **kept}, tmp_path / "out")[0] == 0
    assert figures.items() <= read_json(tmp_path / "out" / "metrics.json").items()


def test_annotations_without_categories_are_named(
    content: Content, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    options = options_for("evaluate", {**content, "categories": []})
    code, _, told = call("evaluate", options, tmp_path / "out")
    assert code == 2
    assert one_line(told), told
    assert "given.json lists no categories" in told


@pytest.mark.parametrize("job", ["train-rpn", "propose", "evaluate"])
@pytest.mark.parametrize(
    ("base", "message"),
    [
        (["cup", "cup"], "'cup' is listed more than once"),
        (["cup", "no such thing"], "1 of its 2 names are not among the annotations' 16 categories"),
    ],
    ids=["duplicates", "unknown"],
)
def test_class_lists_that_do_not_fit_are_refused(
    content: Content,
    job: str,
    base: list[str],
    message: str,
    options_for: MakeOptions,
    call: Command,
    tmp_path: Path,
) -> None:
    write_json(tmp_path / "mine.json", {"base": base, "novel": []})
    options = options_for(job, content)
    code, _, told = call(job, {**options, "split": tmp_path / "mine.json"}, tmp_path / "out")
    assert code == 2
    assert one_line(told), told
    assert message in told


def test_duplicates_in_vocabulary_result_classes_and_pool_are_named(
    content: Content,
    world: Path,
    options_for: MakeOptions,
    mining_options: list[str],
    swapped: Swap,
    concepts_file: Path,
    call: Command,
    tmp_path: Path,
) -> None:
    described = {**options_for("features", content), "vocabulary": "cup, star, cup"}
    code, _, told = call("features", described, tmp_path / "features")
    assert (code, one_line(told), "'cup' occurs more than once" in told) == (2, True, True), told
    write_json(tmp_path / "results.json", [])
    results: Options = {"results": tmp_path / "results.json", "results_categories": "cup, star, cup"}
    results |= {"annotations": world / "instances_train.json"}
    code, _, told = call("evaluate", results, tmp_path / "evaluation")
    assert (code, one_line(told), "'cup' occurs more than once" in told) == (2, True, True), told
    text = concepts_file.read_text()
    write_text(tmp_path / "pool.jsonl", text + text.splitlines()[0])
    given = dict(entry.split("=", 1) for entry in swapped(mining_options, concepts=tmp_path / "pool.jsonl"))
    code, _, told = call("mine", given, tmp_path / "mined")
    assert (code, one_line(told), "pool.jsonl, line 17: 'airplane' occurs twice" in told) == (2, True, True)


def test_results_of_categories_that_are_not_evaluated_are_counted(
    world: Path, content: Content, call: Command, tmp_path: Path
) -> None:
    found = [{**entry, "score": 0.9} for entry in content["annotations"]]
    strange = {**found[0], "category_id": 999}
    degenerate = {**found[0], "bbox": [5, 5, 0, 0], "score": 0.1}
    write_json(tmp_path / "results.json", [*found, strange, strange, degenerate])
    options: Options = {"annotations": world / "instances_train.json", "results": tmp_path / "results.json"}
    assert call("evaluate", {**options, "report": "false"}, tmp_path / "out")[0] == 0
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["ignored_results"] == 2
    assert metrics["AP"] == pytest.approx(1.0)


@pytest.fixture(scope="module")
def odd(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with images of ten thousand pixels, in one direction and in both, and of a single one."""
    folder = tmp_path_factory.mktemp("odd")
    images = shutil.copytree(world / "images", folder / "images")
    content = read_json(world / "instances_train.json")
    sizes = [(2_500, 10_000), (4, 10_000), (10_000, 4), (1, 1)]
    for entry, (height, width) in zip(content["images"], sizes, strict=False):
        cv2.imwrite(str(images / entry["file_name"]), np.full((height, width), 99, np.uint8))
        entry |= {"height": height, "width": width}
        for annotation in content["annotations"]:
            if annotation["image_id"] == entry["id"]:
                annotation["bbox"] = [0, 0, width, height]
    write_json(folder / "instances.json", content)
    write_json(
        folder / "captions.json", {**read_json(world / "captions_train.json"), "images": content["images"]}
    )
    return folder


@pytest.mark.parametrize("job", [*ANNOTATED, "detect"])
def test_pictures_of_ten_thousand_pixels_and_of_one_are_done(
    job: str, odd: Path, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    options = options_for(job, read_json(odd / "instances.json"), odd / "images")
    code, printed, told = call(job, options, tmp_path / "out")
    assert code == 0, told
    assert "left out" not in printed
    assert not (tmp_path / "out" / "skipped.jsonl").exists()
    if job in ("propose", "evaluate", "features"):
        assert read_json(tmp_path / "out" / "metrics.json")["images"] == 12


def test_pictures_of_ten_thousand_pixels_and_of_one_are_mined_and_pretrained_on(
    odd: Path, clip_file: Path, mining_options: list[str], swapped: Swap, call: Command, tmp_path: Path
) -> None:
    given = dict(
        entry.split("=", 1)
        for entry in swapped(mining_options, images=odd / "images", captions=odd / "captions.json")
    )
    assert call("mine", given, tmp_path / "mined")[0] == 0
    assert (tmp_path / "mined" / "skipped.jsonl").read_text() == ""
    training = {"train.steps": 6, "train.batch_size": 2, "train.lr": 0.001, **SMALL}
    options: Options = {"mined": tmp_path / "mined", "weights": clip_file, **training}
    assert call("pretrain", options, tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "skipped.jsonl").exists()
    assert read_json(tmp_path / "out" / "metrics.json")["images"] == 12


@pytest.mark.parametrize("job", [*TRAINING, "pretrain", "propose", "evaluate"])
def test_a_picture_of_another_size_than_its_boxes_were_drawn_in_is_skipped_and_named(
    job: str,
    world: Path,
    content: Content,
    mined: Path,
    clip_file: Path,
    options_for: MakeOptions,
    call: Command,
    tmp_path: Path,
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    base = set(read_json(world / "split.json")["base"])
    ids = {entry["id"] for entry in content["categories"] if entry["name"] in base}
    image = next(entry["image_id"] for entry in content["annotations"] if entry["category_id"] in ids)
    name = next(entry["file_name"] for entry in content["images"] if entry["id"] == image)
    cv2.imwrite(str(images / name), np.full((32, 48, 3), 99, np.uint8))
    options = options_for("train-rpn" if job == "pretrain" else job, content, images)
    if job == "pretrain":
        options = {key: value for key, value in options.items() if key.startswith(("train.", "resize."))}
        options |= {"mined": mined, "images": images, "weights": clip_file}
    assert call(job, options, tmp_path / "out")[0] == 0
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert f"{name} is 48x32 pixels, its annotations say 64x64" in json.loads(line)["reason"]
