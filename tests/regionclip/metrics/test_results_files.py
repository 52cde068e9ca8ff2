"""Results and annotations as other programs write them: evaluated as they are meant, or refused by name."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.data.categories import Split, load_split
from regionclip.data.results import numbered_by, read_results
from regionclip.metrics.average_precision import Protocol, evaluate_detections

NAMES = {"cup": 3, "sports_ball": 7, "dog": 11}
SPLIT = Split(("cup", "sports_ball"), ("dog",))
Entry = dict[str, Any]


@pytest.fixture
def truth() -> Entry:
    boxes = {1: (3, [10, 10, 40, 40]), 2: (7, [50, 50, 30, 30]), 3: (11, [5, 60, 30, 20])}
    return {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "height": 99, "width": 99} for number in (1, 2, 3, 4)
        ],
        "annotations": [
            {"id": image, "image_id": image, "category_id": category, "bbox": box}
            for image, (category, box) in boxes.items()
        ],
        "categories": [{"id": number, "name": name} for name, number in NAMES.items()],
    }


@pytest.fixture
def right(truth: Entry) -> list[Entry]:
    """Results that find every object; image 4 has none."""
    return [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": entry["bbox"],
            "score": 0.9,
        }
        for entry in truth["annotations"]
    ]


def ap50(truth: Entry, results: Any) -> float:
    return evaluate_detections(truth, results, SPLIT).metrics["AP50_all"]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: {"category_id": float(entry["category_id"])},
        lambda entry: {"image_id": float(entry["image_id"])},
        lambda entry: {"image_id": str(entry["image_id"])},
        lambda entry: {"score": 1},
        lambda entry: {"score": 7.5},
        lambda entry: {"score": str(0.9)},
        lambda entry: {"bbox": [str(side) for side in entry["bbox"]]},
        lambda entry: {"id": 1},
        lambda entry: {"id": None, "area": "?", "iscrowd": 1, "segmentation": [[0, 0, 1, 1]]},
    ],
)
def test_whoever_wrote_a_results_file_it_means_the_same(change: Any, truth: Entry, right: list[Entry]):
    assert ap50(truth, [entry | change(entry) for entry in right]) == pytest.approx(1)


def test_a_mask_without_a_box_stands_for_the_box_around_it(truth: Entry, right: list[Entry]):
    for entry in right:
        x, y, w, h = entry.pop("bbox")
        pixels = np.zeros((99, 99), dtype=np.uint8, order="F")
        pixels[y : y + h, x : x + w] = 1
        code = mask.encode(pixels)
        entry["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    assert ap50(truth, right) == pytest.approx(1)
    right[0]["segmentation"] = {"size": [9, 9]}
    with pytest.raises(InputError, match=r"results\[0\] .*the segmentation is not a run-length code"):
        ap50(truth, right)


def test_the_size_of_a_mask_result_is_its_masks_as_pycocotools_takes_it(truth: Entry):
    """A thin diagonal in a large box: by its box a detection that fits nothing would be large."""
    pixels = np.zeros((300, 300), dtype=np.uint8, order="F")
    pixels[np.arange(200), np.arange(200)] = 1
    code = mask.encode(pixels)
    segmentation = {"size": code["size"], "counts": code["counts"].decode()}
    small = {"id": 9, "image_id": 4, "category_id": 3, "bbox": [250, 250, 20, 20], "area": 400}
    truth["annotations"] = [small]
    alarm = {"image_id": 4, "category_id": 3, "segmentation": segmentation, "score": 0.9}
    hit = {"image_id": 4, "category_id": 3, "bbox": small["bbox"], "score": 0.5}
    assert evaluate_detections(truth, [alarm, hit]).metrics["APs"] == pytest.approx(0.5, abs=0.01)
    boxed = {**alarm, "bbox": [0, 0, 200, 200]}
    assert evaluate_detections(truth, [boxed, hit]).metrics["APs"] == pytest.approx(1)


def test_gzipped_files_are_read(truth: Entry, right: list[Entry], tmp_path: Path):
    results, annotations = tmp_path / "results.json.gz", tmp_path / "instances.json.gz"
    results.write_bytes(gzip.compress(json.dumps(right).encode()))
    annotations.write_bytes(gzip.compress(json.dumps(truth).encode()))
    assert evaluate_detections(annotations, results).metrics["AP50"] == pytest.approx(1)
    results.write_bytes(results.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"results.json.gz cannot be unpacked .*was it truncated"):
        read_json(results, "results file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 3.5}, "3.5 is no whole number"),
        ({"category_id": None}, "None is no whole number"),
        ({"category_id": "cup"}, "'cup' is no whole number"),
        ({"image_id": "first.jpg"}, "'first.jpg' is no whole number"),
        ({"image_id": True}, "True is no whole number"),
        ({"bbox": [1, 2, 3]}, "must have four finite"),
        ({"score": float("inf")}, "must have four finite"),
    ],
)
def test_what_no_results_file_holds_is_named(change: Entry, message: str, truth: Entry, right: list[Entry]):
    with pytest.raises(InputError, match=message) as error:
        ap50(truth, [*right, right[0] | change])
    assert "results[3]" in str(error.value)


def test_results_that_count_classes_are_evaluated_with_their_list(truth: Entry, right: list[Entry]):
    listed = ["dog", "zebra", "sports ball", "cup"]
    places = {11: 0, 7: 2, 3: 3}
    for first in (0, 1):
        counted = [entry | {"category_id": places[entry["category_id"]] + first} for entry in right]
        counted.append(right[0] | {"category_id": 1 + first})  # a zebra, which the annotations do not have
        assert numbered_by(counted, listed, first, NAMES) == right
        with pytest.raises(InputError, match=f"results_first_id={1 - first}"):
            numbered_by([right[0] | {"category_id": 4 if not first else 0}], listed, first, NAMES)
    with pytest.raises(InputError, match="none of its 2 names, such as 'cupp', is a category"):
        numbered_by(right, ["cupp", "zebra"], 0, NAMES)


def test_the_80_and_65_class_numberings_of_coco_mean_the_same(shared_data: Path):
    content = read_json(shared_data / "coco_mini" / "instances_val.json")
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    split = load_split("coco", list(names.values()))
    results = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
        for entry in content["annotations"]
        if names[entry["category_id"]] in split.all
    ]
    wanted = evaluate_detections(content, results, split).metrics["AP50_all"]
    ids = {name: number for number, name in names.items()}
    published = json.loads((shared_data / "metadata" / "mscoco_65_classes.json").read_text())
    for listed in ([names[number] for number in sorted(names)], published):
        counted = [entry | {"category_id": listed.index(names[entry["category_id"]])} for entry in results]
        again = numbered_by(counted, listed, 0, ids)
        assert evaluate_detections(content, again, split).metrics["AP50_all"] == wanted > 0.9


def test_results_of_categories_that_are_not_evaluated_are_counted(truth: Entry, right: list[Entry]):
    strangers = [right[0] | {"category_id": number} for number in (11, 12, 90)]
    found = evaluate_detections(truth, right + strangers, Split(("cup", "sports_ball"), ()))
    assert found.ignored == 4
    assert found.metrics["AP50_all"] == pytest.approx(1)


@pytest.mark.parametrize(("compete", "names"), [("base", ["cup", "sports_ball"]), ("novel", ["dog"])])
def test_base_or_novel_names_may_compete_alone(
    compete: str, names: list[str], truth: Entry, right: list[Entry]
):
    found = evaluate_detections(truth, right, SPLIT, Protocol(label_set=compete))
    assert [row["name"] for row in found.per_class] == names
    assert found.ignored == 3 - len(names)
    assert found.metrics[f"AP50_{compete}"] == found.metrics["AP50_all"] == pytest.approx(1)
    other = {"base": "novel", "novel": "base"}[compete]
    assert found.metrics[f"AP50_{other}"] == -1


@pytest.mark.parametrize("seed", [0, 1])
def test_the_fast_evaluator_gives_the_figures_of_pycocotools(seed: int):
    random = np.random.default_rng(seed)
    images, boxes, results = range(0, 60, 3), [], []
    for image in images:
        for number in range(random.integers(0, 7)):
            sides = random.choice([20.0, 60.0, 150.0], 2)
            box = [*random.uniform(0, 200, 2).tolist(), *sides.tolist()]
            entry = {"image_id": image, "category_id": int(random.integers(1, 5)), "bbox": box}
            boxes.append({**entry, "id": len(boxes), "iscrowd": int(number == 5)})
            for _ in range(random.integers(0, 30)):
                near = (np.array(box) + random.normal(0, 8, 4)).clip(0).tolist()
                score = round(random.random(), 2)  # many are equal
                results.append(
                    {**entry, "bbox": near, "score": score, "category_id": int(random.integers(1, 6))}
                )
    truth = {
        "images": [{"id": image} for image in images],
        "annotations": boxes,
        "categories": [{"id": number, "name": f"c{number}"} for number in (5, 1, 2, 3, 4)],
    }
    split = Split(("c1", "c2", "c5"), ("c3", "c4"))
    for most in (0, 7):
        one = evaluate_detections(truth, results, split, Protocol(max_detections=most))
        other = evaluate_detections(truth, results, split, Protocol(evaluator="fast", max_detections=most))
        np.testing.assert_allclose(one.precision, other.precision, atol=1e-6)
        assert one.metrics == pytest.approx(other.metrics, abs=1e-6)
        assert 0 < one.metrics["AP_novel"] < 1
    whole = evaluate_detections(truth, results, split)
    assert np.abs(one.precision - whole.precision).max() > 0.1  # 7 are fewer than there are
    empty = evaluate_detections(truth, [], split, Protocol(evaluator="fast"))
    assert empty.metrics["AP"] == 0


def test_the_fast_evaluator_prints_nothing(
    truth: Entry, right: list[Entry], capfd: pytest.CaptureFixture[str]
):
    evaluate_detections(truth, right, SPLIT, Protocol(evaluator="fast"))
    assert capfd.readouterr().out == ""


def test_without_its_package_the_fast_evaluator_says_what_to_install(
    truth: Entry, right: list[Entry], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"pip install 'regionclip\[fast\]'"):
        evaluate_detections(truth, right, SPLIT, Protocol(evaluator="fast"))


def test_an_image_without_an_id_is_named(truth: Entry, right: list[Entry]):
    truth["images"][2] = {"file_name": "3.jpg"}
    with pytest.raises(InputError, match=r"images\[2\] needs a whole number 'id'"):
        ap50(truth, right)


def test_a_results_files_entries_keep_only_what_counts(right: list[Entry]):
    read = read_results([entry | {"extra": 1} for entry in right], {1: "", 2: "", 3: ""}, "annotations")
    assert read.entries == right
