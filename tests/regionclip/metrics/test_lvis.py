"""LVIS's federated protocol: equal to a plain loop and to faster-coco-eval, rule by rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from clip_base.runtime.errors import InputError
from regionclip.data.categories import load_split
from regionclip.metrics.average_precision import Protocol, evaluate_detections
from regionclip.metrics.lvis import match

KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
Content = dict[str, Any]


def world(seed: int, images: int = 25, categories: int = 9) -> tuple[Content, list[dict[str, Any]]]:
    """Returns federated annotations, and noisy detections in many of the categories nobody looked for."""
    random = np.random.default_rng(seed)
    truth: Content = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": 3 * k + 1, "name": f"c{k}", "frequency": "rcf"[k % 3]} for k in range(categories)
        ],
    }
    results = []
    for image in range(0, 7 * images, 7):
        order = (3 * random.permutation(categories) + 1).tolist()
        positive, negative, partly = order[:3], order[3:6], [order[0], order[4]]
        fields = {"neg_category_ids": negative, "not_exhaustive_category_ids": partly[: random.integers(3)]}
        truth["images"].append({"id": image, "height": 400, "width": 400, **fields})
        for category in np.repeat(positive, random.integers(1, 4)).tolist():
            sides = random.choice([20.0, 60.0, 150.0], 2)
            box = [*random.uniform(0, 200, 2).tolist(), *sides.tolist()]
            entry = {
                "id": len(truth["annotations"]) + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
            }
            truth["annotations"].append({**entry, "area": float(sides.prod()) * 0.8})
            for _ in range(random.integers(0, 4)):
                guess = category if random.random() < 0.7 else random.choice(order)
                near = (np.array(box) + random.normal(0, 5, 4)).clip(1).tolist()
                results.append(
                    {
                        "image_id": image,
                        "category_id": int(guess),
                        "bbox": near,
                        "score": round(random.random(), 2),
                    }
                )
        for _ in range(random.integers(0, 40)):
            box = [*random.uniform(0, 200, 2).tolist(), *random.uniform(10, 150, 2).tolist()]
            score = round(random.random() * 0.9, 2)
            results.append(
                {"image_id": image, "category_id": int(random.choice(order)), "bbox": box, "score": score}
            )
    return truth, results


def measured(truth: Content, results: list[dict[str, Any]], **options: Any) -> dict[str, float]:
    names = [entry["name"] for entry in truth["categories"]]
    often = [entry["frequency"] for entry in truth["categories"]]
    return evaluate_detections(truth, results, load_split("lvis", names, often), Protocol(**options)).metrics


def naive(truth: Content, results: list[dict[str, Any]], most: int, level: float) -> dict[str, float]:
    """AP at one IoU of each frequency, an image, a detection and a true box at a time."""
    ap: dict[str, list[float]] = {"r": [], "c": [], "f": []}
    kept = []
    for image in truth["images"]:
        mine = [entry for entry in results if entry["image_id"] == image["id"]]
        kept += sorted(mine, key=lambda entry: -entry["score"])[:most]
    for category in truth["categories"]:
        rows: list[tuple[float, bool]] = []
        count = 0
        for image in truth["images"]:
            where = (image["id"], category["id"])
            boxes = [e for e in truth["annotations"] if (e["image_id"], e["category_id"]) == where]
            found = [e for e in kept if (e["image_id"], e["category_id"]) == where]
            count += len(boxes)
            if not boxes and category["id"] not in image["neg_category_ids"]:
                continue
            free = set(range(len(boxes)))
            for entry in sorted(found, key=lambda entry: -entry["score"]):
                overlaps = mask.iou([entry["bbox"]], [box["bbox"] for box in boxes], [0] * len(boxes))
                fitting = [place for place in free if overlaps[0][place] >= level]
                if fitting:
                    free.remove(max(fitting, key=lambda place: float(overlaps[0][place])))
                    rows.append((entry["score"], True))
                elif category["id"] not in image["not_exhaustive_category_ids"]:
                    rows.append((entry["score"], False))
        if count:
            ap[category["frequency"]].append(area_under(rows, count))
    return {f"AP{letter}": float(np.mean(values)) for letter, values in ap.items()}


def area_under(rows: list[tuple[float, bool]], count: int) -> float:
    """The mean over 101 recalls of the best precision at that recall or beyond."""
    points, right = [], 0
    for number, (_, is_right) in enumerate(sorted(rows, key=lambda row: -row[0]), start=1):
        right += is_right
        points.append((right / count, right / number))
    return sum(
        max((precision for recall, precision in points if recall >= step), default=0.0)
        for step in np.linspace(0, 1, 101)
    ) / 101  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("most", [300, 12])
def test_figures_are_those_of_faster_coco_eval(seed: int, most: int):
    truth, results = world(seed)
    ours = measured(truth, results, max_detections=most)
    theirs = measured(truth, results, max_detections=most, evaluator="fast")
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert set(KEYS) <= ours.keys()
    assert 0 < ours["APr"] == ours["AP_novel"] < 1


@pytest.mark.parametrize("level", [0.5, 0.75])
def test_figures_are_those_of_a_plain_loop(level: float):
    truth, results = world(3, images=12)
    names = [entry["name"] for entry in truth["categories"]]
    found = evaluate_detections(truth, results, load_split("lvis", names, ["r", "c", "f"] * 3))
    place = round((level - 0.5) / 0.05)
    expected = naive(truth, results, 300, level)
    for letter in "rcf":
        columns = [k for k, entry in enumerate(truth["categories"]) if entry["frequency"] == letter]
        table = found.precision[place, :, columns, 0]
        mine = table[table > -1].mean()
        assert mine == pytest.approx(expected[f"AP{letter}"], abs=1e-9)


def one_image(**fields: list[int]) -> Content:
    image = {"id": 1, "height": 100, "width": 100, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600}
    names = ("cup", "dog", "cow")
    categories = [{"id": k + 1, "name": names[k], "frequency": "rcf"[k]} for k in range(3)]
    return {"images": [image | fields], "annotations": [box], "categories": categories}


def detection(category: int, score: float, box: tuple[int, ...] = (10, 10, 40, 40)) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "bbox": list(box), "score": score}


RIGHT, ASTRAY = detection(1, 0.5), detection(1, 0.9, (60, 60, 20, 20))


def test_what_nobody_looked_for_is_ignored_and_what_is_known_to_be_absent_is_wrong():
    other = detection(2, 0.9)
    silent = evaluate_detections(one_image(), [RIGHT, other])
    assert silent.ignored == 1
    assert silent.per_class[1]["detections"] == 0
    told = evaluate_detections(one_image(neg_category_ids=[2]), [RIGHT, other])
    assert told.ignored == 0
    assert told.metrics["AP"] == pytest.approx(1)  # a category without any true box has no AP
    wrong = evaluate_detections(one_image(), [RIGHT, ASTRAY])
    assert wrong.metrics["AP50"] == pytest.approx(0.5)


def test_of_a_category_that_is_not_exhaustive_a_false_alarm_does_not_count():
    assert measured(one_image(not_exhaustive_category_ids=[1]), [RIGHT, ASTRAY])["APr"] == pytest.approx(1)
    assert measured(one_image(not_exhaustive_category_ids=[2]), [RIGHT, ASTRAY])["APr"] == pytest.approx(0.5)


def test_an_images_best_detections_count_over_all_categories_together():
    crowd = [detection(3, 0.8) for _ in range(300)]
    assert measured(one_image(), [RIGHT, *crowd[:299]])["APr"] == pytest.approx(1)
    assert measured(one_image(), [RIGHT, *crowd])["APr"] == 0
    assert measured(one_image(), [RIGHT, *crowd], max_detections=301)["APr"] == pytest.approx(1)


def test_without_detections_ap_is_zero():
    assert measured(one_image(), [])["AP"] == 0
    assert measured(one_image(), [])["APf"] == -1


def test_coco_annotations_are_not_measured_by_lvis_protocol_and_the_reverse_is_a_choice():
    plain = one_image()
    del plain["images"][0]["neg_category_ids"]
    assert "APr" not in evaluate_detections(plain, [RIGHT]).metrics
    with pytest.raises(InputError, match="image 1 has no list 'neg_category_ids'"):
        evaluate_detections(plain, [RIGHT], protocol=Protocol("lvis"))
    assert "APr" not in evaluate_detections(one_image(), [RIGHT], protocol=Protocol("coco")).metrics
    nameless = one_image()
    del nameless["categories"][1]["frequency"]
    with pytest.raises(InputError, match="category 'dog' has no `frequency`"):
        evaluate_detections(nameless, [RIGHT])


def test_a_box_of_an_image_that_is_not_listed_is_no_miss():
    truth = one_image()
    truth["annotations"].append(truth["annotations"][0] | {"id": 2, "image_id": 77})
    assert measured(truth, [RIGHT])["APr"] == pytest.approx(1)


def test_a_box_that_does_not_count_is_taken_only_where_no_other_fits():
    overlaps = np.array([[0.9, 0.6, 0.0], [0.8, 0.7, 0.0]])
    hit, aside = match(overlaps, np.array([[True, False, False]]))
    assert hit[0, 0].tolist() == [True, True]  # at IoU 0.5
    assert aside[0, 0].tolist() == [False, True]  # the first has taken the second box, which counts
    assert aside[3, 0].tolist() == [True, False]  # at IoU 0.65 only the first box fits it
    assert hit[9, 0].tolist() == [False, False]  # nothing fits at IoU 0.95
