"""Odd entries of COCO's files mean one thing in every reader, or are one line that names the entry.

Covered: captions of pretrain and retrieval, captions to mine, annotations of detector training, evaluation,
zero-shot classification and the linear probe, results, and boxes as proposals.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from clip_base.data.coco import read_captions
from clip_base.evaluation.datasets import coco_images
from clip_base.runtime.errors import InputError
from regionclip.data.annotations import CocoDetection
from regionclip.data.caption_index import CaptionIndex, write_caption_index
from regionclip.data.results import read_results
from regionclip.metrics.average_precision import evaluate_detections
from regionclip.proposals.precomputed import PrecomputedConfig, PrecomputedProposer

Entry = dict[str, Any]


def content() -> Entry:
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 40, "width": 60} for n in (1, 2)],
        "annotations": [
            {
                "id": n,
                "image_id": n,
                "category_id": 3,
                "bbox": [n, 2, 10, 12],
                "caption": f"cat {n}",
                "iscrowd": 0,
            }
            for n in (1, 2)
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }


def listed(path: Path) -> dict[int, list[str]]:
    write_caption_index(path, path.with_suffix(".db"))
    images = CaptionIndex(path.with_suffix(".db"))
    return {image.image_id: list(image.captions) for part in images.slices(9) for image in images.read(part)}


def perfect(path: Path) -> float:
    results = [{"image_id": n, "category_id": 3, "bbox": [n, 2, 10, 12], "score": 0.5} for n in (1, 2)]
    return evaluate_detections(path, results).metrics["AP50"]


CAPTIONS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "captions": (lambda path: read_captions(path)[0], {1: ["cat 1"], 2: ["cat 2"]}),
    "captions to mine": (listed, {1: ["cat 1"], 2: ["cat 2"]}),
}
BOXES: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "dataset": (
        lambda path: [(r.image_id, r.boxes.tolist()) for r in CocoDetection(path, None).without_crowds()],
        [(1, [[1, 2, 11, 14]]), (2, [[2, 2, 12, 14]])],
    ),
    "evaluation": (perfect, pytest.approx(1)),
    "zeroshot": (
        lambda path: [(p.path.name, p.label, p.box) for p in coco_images(str(path), ".")[1]],
        [("1.jpg", 0, (1, 2, 10, 12)), ("2.jpg", 0, (2, 2, 10, 12))],
    ),
}


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [e.update(id=str(e["id"])) for e in c["images"]],
        lambda c: [e.update(image_id=float(e["image_id"])) for e in c["annotations"]],
        lambda c: [e.update(image_id=str(e["image_id"]), category_id="3") for e in c["annotations"]],
        lambda c: [e.update(id="3") for e in c["categories"]],
        lambda c: [e.update(iscrowd="0") for e in c["annotations"]],
        lambda c: [e.update(iscrowd=False, area=None) for e in c["annotations"]],
        lambda c: [e.update(bbox=[str(side) for side in e["bbox"]]) for e in c["annotations"]],
        lambda c: [e.update(height="40", width=60.0) for e in c["images"]],
        lambda c: c["images"].append(c["images"][0]),
        lambda c: [e.update(id=[1]) for e in c["annotations"]],
    ],
)
@pytest.mark.parametrize("reader", CAPTIONS | BOXES)
def test_what_has_one_meaning_is_taken_for_it(
    tmp_path: Path, change: Callable[[Entry], Any], reader: str
) -> None:
    odd = content()
    change(odd)
    read, found = (CAPTIONS | BOXES)[reader]
    assert read(write(tmp_path / "a.json", odd)) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].update(id="img_2"), r"images\[1\] needs a whole number 'id'"),
        (lambda c: c["images"][1].update(id=2**63), "below 2 to the power of 63"),
        (lambda c: c["images"][1].update(id=2.5), r"images\[1\] needs a whole number 'id'"),
        (lambda c: c["images"][1].update(id=True), r"images\[1\] needs a whole number 'id'"),
        (lambda c: c["images"].append([3, "c.jpg"]), r"images\[2\] is not an object: \[3, 'c.jpg'\]"),
        (lambda c: c["images"][1].update(id=1), "image id 1 is used for both 1.jpg and 2.jpg"),
        (lambda c: c["images"][1].update(id="1"), "image id 1 is used for both 1.jpg and 2.jpg"),
        (lambda c: c["images"][1].update(file_name=None), r"images\[1\] needs a 'file_name'"),
        (
            lambda c: c["annotations"][1].update(image_id=None),
            r"annotations\[1\] needs a whole number 'image_id'",
        ),
        (lambda c: c["annotations"].append([3, "c"]), r"annotations\[2] is not an object"),
        (lambda c: c["annotations"][1].update(iscrowd="no"), r"annotations\[1\]: 'iscrowd' must be 0 or 1"),
        (lambda c: c["annotations"][1].update(iscrowd=[0]), r"annotations\[1\]: 'iscrowd' must be 0 or 1"),
    ],
)
@pytest.mark.parametrize("reader", CAPTIONS | BOXES)
def test_what_has_none_is_one_line_that_names_the_entry(
    tmp_path: Path, change: Callable[[Entry], Any], message: str, reader: str
) -> None:
    odd = content()
    change(odd)
    if reader == "evaluation" and "file" in message:
        pytest.skip("evaluation opens no images")
    with pytest.raises(InputError, match=message) as caught:
        (CAPTIONS | BOXES)[reader][0](write(tmp_path / "a.json", odd))
    assert "a.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", BOXES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotations\[1\] needs a 'bbox' of four"),
        (lambda c: c["annotations"][1].update(bbox="1234"), r"annotations\[1\] needs a 'bbox' of four"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]),
            r"annotations\[1\] needs a 'bbox'",
        ),
        (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] needs a 'bbox' of four"),
        (lambda c: c["categories"][0].update(name=None), r"categories\[0\] needs a 'name'"),
        (
            lambda c: c["categories"].append({"id": 3, "name": "dog"}),
            "category id 3 is used for both 'cat' and",
        ),
        (lambda c: c["categories"].append({"id": "4", "name": "cat"}), "two categories are called 'cat'"),
    ],
)
def test_boxes_and_categories_are_checked_alike(
    tmp_path: Path, change: Callable[[Entry], Any], message: str, reader: str
) -> None:
    odd = content()
    change(odd)
    with pytest.raises(InputError, match=message):
        BOXES[reader][0](write(tmp_path / "a.json", odd))


def test_an_area_is_a_number_or_refused(tmp_path: Path) -> None:
    odd = content()
    odd["annotations"][0]["area"] = "n/a"
    with pytest.raises(InputError, match=r"annotations\[0\]: 'area' must be a number .*'n/a'.*leave it out"):
        perfect(write(tmp_path / "a.json", odd))
    odd["annotations"][0]["area"] = "120.5"
    assert perfect(write(tmp_path / "a.json", odd)) == pytest.approx(1)


def test_a_crowd_written_as_text_is_one(tmp_path: Path) -> None:
    odd = content()
    odd["annotations"][0]["iscrowd"] = "1"
    path = write(tmp_path / "a.json", odd)
    assert [len(record.boxes) for record in CocoDetection(path, None).without_crowds()] == [0, 1]
    assert [picture.path.name for picture in coco_images(str(path), ".")[1]] == ["2.jpg"]


def test_an_uncompressed_run_length_code_is_read_as_a_compressed_one() -> None:
    pixels = np.zeros((40, 60), dtype=np.uint8, order="F")
    pixels[2:14, 1:11] = 1
    flat = pixels.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    code = mask.encode(pixels)
    entry = {"image_id": 1, "category_id": 3, "score": 0.5}
    forms = ({"size": [40, 60], "counts": counts}, {"size": code["size"], "counts": code["counts"].decode()})
    boxes = [
        read_results([{**entry, "segmentation": form}], {1: ""}, "truth").entries[0]["bbox"] for form in forms
    ]
    assert boxes == [[1, 2, 10, 12]] * 2
    for wrong in ([5, 5], [-5, 2405], ["a"]):
        with pytest.raises(InputError, match=r"results\[0\] .*not a run-length code"):
            read_results([{**entry, "segmentation": {"size": [40, 60], "counts": wrong}}], {1: ""}, "truth")


def test_text_ids_of_results_are_one_line_that_asks_for_numbers(tmp_path: Path) -> None:
    odd = content()
    odd["images"][0]["id"] = odd["annotations"][0]["image_id"] = "img_1"
    with pytest.raises(InputError, match=r"images\[0\] needs a whole number 'id', found .*img_1"):
        evaluate_detections(write(tmp_path / "a.json", odd), [])
    with pytest.raises(InputError, match=r"results\[0\] .*'img_1' is no whole number"):
        read_results(
            [{"image_id": "img_1", "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}], {1: ""}, "truth"
        )


@pytest.mark.parametrize("image_id", [3.7, "img_3", None, 2**63])
def test_proposals_of_no_image_are_refused(tmp_path: Path, image_id: Any) -> None:
    entry = {"image_id": image_id, "bbox": [0, 0, 5, 5], "score": 0.5}
    with pytest.raises(InputError, match=r"entry 0 needs a whole number"):
        PrecomputedProposer(PrecomputedConfig(file=str(write(tmp_path / "p.json", [entry]))))
