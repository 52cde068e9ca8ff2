"""What `evaluate results=` says of files that mean something else, and what our own detections give."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs.cli import main_regionclip
from clip_base.storage.files import read_json, write_json

Entry = dict[str, Any]
Evaluate = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def truth(world: Path) -> dict[str, Any]:
    return dict(read_json(world / "instances_train.json"))


@pytest.fixture
def perfect(truth: dict[str, Any]) -> list[Entry]:
    """Results that are the annotations."""
    return [
        {**{key: entry[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for entry in truth["annotations"]
    ]


@pytest.fixture
def evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Evaluates results: metrics, and what was printed; evaluated(annotations, results, *options)."""

    def run(annotations: dict[str, Any], results: list[Entry], *options: str) -> tuple[dict[str, Any], str]:
        write_json(tmp_path / "truth.json", annotations)
        write_json(tmp_path / "results.json", results)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        files = [f"annotations={tmp_path / 'truth.json'}", f"results={tmp_path / 'results.json'}"]
        assert main_regionclip(["evaluate", *files, "report=false", *options, f"out={out}"]) == 0
        return read_json(out / "metrics.json"), capsys.readouterr().out

    return run


def with_boxes(results: list[Entry], convert: Callable[..., list[float]]) -> list[Entry]:
    return [{**entry, "bbox": convert(*entry["bbox"])} for entry in results]


FORMS: dict[str, Callable[..., list[float]]] = {
    "x1, y1, x2, y2:": lambda x, y, w, h: [x, y, x + w, y + h],
    "x1, y1, x2, y2 in shares of the image:": lambda x, y, w, h: [side / 64 for side in (x, y, x + w, y + h)],
    "x, y, width, height in shares of the image:": lambda x, y, w, h: [side / 64 for side in (x, y, w, h)],
    "x, y, width, height with negative sides:": lambda x, y, w, h: [x + w, y + h, -w, -h],
}


@pytest.mark.parametrize("form", FORMS)
def test_perfect_boxes_in_another_form_are_recognized(
    form: str, truth: dict[str, Any], perfect: list[Entry], evaluated: Evaluate
) -> None:
    metrics, printed = evaluated(truth, with_boxes(perfect, FORMS[form]))
    assert metrics["AP50"] < 0.5
    assert f"the boxes seem to be {form} read so, AP50 is 1.0000 instead of {metrics['AP50']:.4f}" in printed


def test_perfect_and_poor_boxes_in_cocos_form_are_not_suspected(
    truth: dict[str, Any], perfect: list[Entry], evaluated: Evaluate
) -> None:
    poor = with_boxes(perfect, lambda x, y, w, h: [max(x - 30, 0), y, w, h])
    for results in (perfect, poor):
        assert "note" not in evaluated(truth, results)[1]


def test_a_few_negative_sides_are_counted(
    truth: dict[str, Any], perfect: list[Entry], evaluated: Evaluate
) -> None:
    x, y, w, h = perfect[0]["bbox"]
    perfect[0]["bbox"] = [x, y, -w, -h]
    _, printed = evaluated(truth, perfect)
    assert f"1 of {len(perfect)} boxes have negative sides and fit nothing" in printed


def test_the_order_in_which_a_class_list_was_counted_is_said(
    truth: dict[str, Any], perfect: list[Entry], evaluated: Evaluate, tmp_path: Path
) -> None:
    """As with coco65, whose file lists base names and then novel ones: not in the order of their ids."""
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    listed = [names[number] for number in sorted(names)]
    shuffled = random.Random(0).sample(listed, len(listed))
    (tmp_path / "list.txt").write_text("\n".join(shuffled))
    option = f"results_categories={tmp_path / 'list.txt'}"

    def counted(order: list[str]) -> list[Entry]:
        return [{**entry, "category_id": order.index(names[entry["category_id"]])} for entry in perfect]

    metrics, printed = evaluated(truth, counted(shuffled), option)
    assert metrics["AP50"] == pytest.approx(1)
    assert f"in its own order: 0 is {shuffled[0]!r}, 1 is {shuffled[1]!r}" in printed
    assert "instead of" not in printed

    metrics, printed = evaluated(truth, counted(listed), option)
    assert metrics["AP50"] < 0.5
    assert f"(0 is {listed[0]!r}) AP50 is 1.0000 instead of {metrics['AP50']:.4f}" in printed


def test_our_own_detections_are_evaluated_by_their_names(
    world: Path, truth: dict[str, Any], detector_file: Path, tmp_path: Path, evaluated: Evaluate
) -> None:
    """`detect` counts images by sorted name and its own words; the annotations number both otherwise."""
    folder = tmp_path / "photos"
    folder.mkdir()
    mixed = list(range(1, len(truth["images"]) + 1))
    random.Random(1).shuffle(mixed)
    for entry, number in zip(truth["images"], mixed, strict=True):
        shutil.copy(world / "images" / entry["file_name"], folder / f"{number}.png")  # 10 sorts before 2
        entry["file_name"] = f"{number}.png"
    names = [entry["name"] for entry in truth["categories"]]
    (tmp_path / "names.txt").write_text("\n".join(reversed(names)))
    sizes = [
        "resize.short=[64]",
        "resize.long=64",
        "precision=fp32",
        "use_checkpoint_config=false",
        "draw=false",
    ]
    words = [f"vocabulary={tmp_path / 'names.txt'}", f"weights={detector_file}"]
    assert main_regionclip(["detect", str(folder), *sizes, *words, f"out={tmp_path / 'found'}"]) == 0
    detections = read_json(tmp_path / "found" / "detections.json")

    ids = {entry["file_name"]: entry["id"] for entry in truth["images"]}
    numbers = {entry["name"]: entry["id"] for entry in truth["categories"]}
    right = [
        {
            "image_id": ids[Path(entry["file_name"]).name],
            "category_id": numbers[entry["category_name"]],
            "bbox": entry["bbox"],
            "score": entry["score"],
        }
        for entry in detections
    ]
    assert right != [{key: entry[key] for key in right[0]} for entry in detections]
    wanted, _ = evaluated(truth, right)
    found, printed = evaluated(truth, detections)
    assert found == wanted
    assert wanted["AP50"] > 0
    assert "images are found by file_name" in printed
    assert "categories are found by category_name" in printed


def test_a_list_of_classes_for_results_that_have_names_is_refused(
    truth: dict[str, Any], perfect: list[Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    named = [{**entry, "category_name": names[entry["category_id"]]} for entry in perfect]
    write_json(tmp_path / "truth.json", truth)
    (tmp_path / "results.json").write_text(json.dumps(named))
    files = [f"annotations={tmp_path / 'truth.json'}", f"results={tmp_path / 'results.json'}"]
    assert main_regionclip(["evaluate", *files, "results_categories=coco", f"out={tmp_path / 'out'}"]) == 2
    assert "category_name for each detection: omit results_categories=" in capsys.readouterr().err
