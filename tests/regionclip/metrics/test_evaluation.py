"""AP equals pycocotools', by class and by split; recall and accuracy equal what is counted by hand."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from clip_base.runtime.errors import InputError
from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import Split, load_split
from regionclip.metrics.average_precision import classification_accuracy, evaluate_detections
from regionclip.metrics.recall import proposal_recall

SPLIT = Split(("cat", "dog"), ("cow",))


def world(seed: int = 0, images: int = 30) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns annotations of four categories and noisy detections of them."""
    random = np.random.default_rng(seed)
    names = ["cat", "dog", "cow", "hen"]
    truth: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 400, "width": 400} for i in range(images)],
        "categories": [{"id": 10 * k + 1, "name": name} for k, name in enumerate(names)],
        "annotations": [],
    }
    results = []
    for i in range(images):
        for _ in range(random.integers(0, 6)):
            sides = random.choice([20, 60, 150], 2)
            box = [*random.uniform(0, 200, 2).tolist(), *map(float, sides)]
            category = int(10 * random.integers(0, 4) + 1)
            entry = {"id": len(truth["annotations"]) + 1, "image_id": i, "category_id": category, "bbox": box}
            entry |= {"area": float(sides.prod()) * 0.8, "iscrowd": int(random.random() < 0.1)}
            truth["annotations"].append(entry)
            for _ in range(random.integers(0, 4)):
                near = (np.array(box) + random.normal(0, 6, 4)).clip(1).tolist()
                guess = category if random.random() < 0.7 else int(10 * random.integers(0, 4) + 1)
                entry = {"image_id": i, "category_id": guess, "bbox": near, "score": float(random.random())}
                results.append(entry)
    return truth, results


def reference(truth: Path, results: Path, categories: list[int]) -> list[float]:
    """pycocotools' own twelve figures, from the files and by its own reader."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        evaluation.params.catIds = categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def write(folder: Path, truth: Any, results: Any) -> tuple[Path, Path]:
    paths = folder / "instances.json", folder / "results.json"
    for path, value in zip(paths, (truth, results), strict=True):
        path.write_text(json.dumps(value))
    return paths


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_those_pycocotools_gives_for_the_files(tmp_path: Path, seed: int):
    truth, results = world(seed)
    paths = write(tmp_path, truth, results)
    found = evaluate_detections(*paths, SPLIT)
    wanted = reference(*paths, [1, 11, 21])
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [found.metrics[key] for key in keys] == pytest.approx(wanted[:6], abs=1e-12)
    for part, categories in (("base", [1, 11]), ("novel", [21]), ("all", [1, 11, 21])):
        ap, ap50 = reference(*paths, categories)[:2]
        assert found.metrics[f"AP_{part}"] == pytest.approx(ap, abs=1e-12)
        assert found.metrics[f"AP50_{part}"] == pytest.approx(ap50, abs=1e-12)
    for row in found.per_class:
        ap, ap50 = reference(*paths, [row["category_id"]])[:2]
        assert (row["AP"], row["AP50"]) == pytest.approx((ap, ap50), abs=1e-12)
    assert [(row["name"], row["novel"]) for row in found.per_class] == [("cat", 0), ("dog", 0), ("cow", 1)]
    assert found.ignored == sum(entry["category_id"] == 31 for entry in results) > 0
    assert 0 < found.metrics["AP"] < 1


def test_without_a_split_every_category_counts(tmp_path: Path):
    truth, results = world()
    paths = write(tmp_path, truth, results)
    found = evaluate_detections(truth, results)
    assert (
        found.metrics["AP_all"] == found.metrics["AP"] == pytest.approx(reference(*paths, [1, 11, 21, 31])[0])
    )
    assert "AP_novel" not in found.metrics
    assert found.ignored == 0


def test_the_truth_as_result_scores_one_even_when_ids_start_at_zero_or_repeat():
    truth, _ = world()
    truth["annotations"] = [entry | {"iscrowd": 0} for entry in truth["annotations"]]
    results = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for entry in truth["annotations"]
    ]
    for number, entry in enumerate(truth["annotations"]):
        entry["id"] = number // 2
        del entry["area"]
    assert evaluate_detections(truth, results, SPLIT).metrics["AP_all"] == pytest.approx(1)


def test_no_detections_score_zero_and_no_truth_scores_nothing():
    truth, _ = world()
    empty = evaluate_detections(truth, [], SPLIT)
    assert empty.metrics["AP"] == empty.metrics["AP50_novel"] == 0
    truth["annotations"] = [entry for entry in truth["annotations"] if entry["category_id"] != 21]
    without = evaluate_detections(truth, [], SPLIT)
    assert without.metrics["AP50_novel"] == -1
    assert without.metrics["AP50_all"] == 0


def test_evaluation_prints_nothing(capsys: pytest.CaptureFixture[str]):
    evaluate_detections(*world(), SPLIT)
    assert capsys.readouterr().out == ""


GOOD = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"score": math.nan}, r"\[1\] must have four finite"),
        ({"bbox": [0, 0, 5]}, r"\[1\] must have four finite"),
        ({"bbox": None}, r"\[1\] needs image_id"),
        ({"score": "high"}, r"\[1\] needs image_id"),
        ({"image_id": 999}, "1 of 2 detections are in images that annotations does not have"),
    ],
)
def test_malformed_results_are_named(entry: dict[str, Any], message: str):
    truth, _ = world()
    with pytest.raises(InputError, match=message):
        evaluate_detections(truth, [GOOD, GOOD | entry])
    with pytest.raises(InputError, match="no 'score'"):
        evaluate_detections(truth, [{key: value for key, value in GOOD.items() if key != "score"}])


def test_annotations_given_as_results_are_recognized(tmp_path: Path):
    path, _ = write(tmp_path, world()[0], [])
    with pytest.raises(InputError, match="that is an annotations file"):
        evaluate_detections(path, path)


def test_a_split_of_other_names_is_refused():
    with pytest.raises(InputError, match="no category 'zebra'"):
        evaluate_detections(*world(), Split(("cat",), ("zebra",)))


def test_real_proposals_score_as_pycocotools_says(shared_data: Path, tmp_path: Path):
    truth = shared_data / "coco_mini" / "instances_val.json"
    results = json.loads((shared_data / "coco_mini" / "proposals_yolox_nano_val.json").read_text())
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    names = {entry["name"]: entry["id"] for entry in json.loads(truth.read_text())["categories"]}
    split = load_split("coco", list(names))
    found = evaluate_detections(truth, path, split)
    wanted = reference(truth, path, [names[name] for name in split.all])
    assert [found.metrics[key] for key in ("AP", "AP50", "APs")] == pytest.approx(
        [wanted[0], wanted[1], wanted[3]]
    )


def test_proposals_cover_one_box_each():
    truth = [
        torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]]),
        torch.tensor([[20.0, 20, 40, 40]]),
        torch.zeros(0, 4),
    ]
    proposals = [
        torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 9]]),
        torch.tensor([[20.0, 20, 40, 34]]),
        torch.tensor([[0.0, 0, 1, 1]]),
    ]
    novel = [torch.tensor([False, True]), torch.tensor([True]), torch.zeros(0, dtype=torch.bool)]
    found = proposal_recall(truth, proposals, novel, limits=(1, 3))
    assert found["recall@1"] == pytest.approx(2 / 3)
    assert found["recall@3"] == 1
    assert found["recall@1_base"] == 1
    assert found["recall@1_novel"] == 0.5
    # IoU 0.7 counts at 0.5, 0.55, 0.6, 0.65 and 0.7 of ten thresholds.
    assert found["AR@3"] == pytest.approx((1 + 1 + 0.5) / 3, abs=0.04)
    nothing = proposal_recall([torch.zeros(0, 4)], [torch.zeros(0, 4)], limits=(10,))
    assert {"recall@10", "recall75@10", "AR@10"} < set(nothing)
    assert set(nothing.values()) == {-1}


@pytest.mark.parametrize("seed", [0, 1])
def test_average_recall_of_proposals_is_close_to_pycocotools(seed: int):
    # pycocotools hands boxes out by score and anew for each IoU, so that single boxes may differ.
    truth, results = world(seed, images=40)
    truth["annotations"] = [entry | {"iscrowd": 0, "category_id": 1} for entry in truth["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = truth
        index.createIndex()
        results = [entry | {"category_id": 1} for entry in results]
        detected = index.loadRes(results)
        evaluation = COCOeval(index, detected, "bbox")
        evaluation.params.maxDets = [1, 3, 100]
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0, 0, :]  # [T, limits]

    def corners(entries: list[dict[str, Any]], image: int) -> torch.Tensor:
        mine = [entry["bbox"] for entry in entries if entry["image_id"] == image]
        boxes = torch.tensor(mine, dtype=torch.float64).reshape(-1, 4)
        return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)

    results.sort(key=lambda entry: -entry["score"])
    images = [entry["id"] for entry in truth["images"]]
    boxes = [corners(truth["annotations"], image) for image in images]
    found = proposal_recall(boxes, [corners(results, image) for image in images], limits=(1, 3, 100))
    for place, limit in enumerate((1, 3, 100)):
        assert found[f"recall@{limit}"] == pytest.approx(recall[0, place], abs=0.01)
        assert found[f"AR@{limit}"] == pytest.approx(recall[:, place].mean(), abs=0.01)
    assert 0.1 < found["AR@1"] < found["AR@100"] < 1


def test_proposal_recall_on_real_photographs_is_the_published_one(shared_data: Path):
    folder = shared_data / "coco_mini"
    data = CocoDetection(folder / "instances_val.json", None).without_crowds()
    boxes: dict[int, list[list[float]]] = {record.image_id: [] for record in data}
    entries = json.loads((folder / "proposals_yolox_nano_val.json").read_text())
    for entry in sorted(entries, key=lambda entry: -entry["score"]):
        x, y, width, height = entry["bbox"]
        boxes[entry["image_id"]].append([x, y, x + width, y + height])
    proposals = [torch.tensor(boxes[record.image_id]).reshape(-1, 4) for record in data]
    found = proposal_recall([record.boxes for record in data], proposals, limits=(10, 100))
    assert found["recall@100"] == pytest.approx(0.76, abs=0.03)
    assert found["recall@10"] < found["recall@100"]
    assert found["AR@100"] < found["recall@100"]


def test_accuracy_counts_the_rank_of_the_true_name():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.4, 0.3], [0.1, 0.2, 0.7], [0.3, 0.3, 0.3]])
    labels = torch.tensor([0, 1, 2, 2])
    found = classification_accuracy(scores, labels, torch.tensor([False, False, True]), top=(1, 2))
    assert found == {
        "top1": 0.5,
        "top1_base": 0.5,
        "top1_novel": 0.5,
        "top2": 0.75,
        "top2_base": 1.0,
        "top2_novel": 0.5,
    }
    assert classification_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == {
        "top1": -1,
        "top5": -1,
    }
    with pytest.raises(ValueError, match="NaN"):
        classification_accuracy(scores * math.nan, labels)
