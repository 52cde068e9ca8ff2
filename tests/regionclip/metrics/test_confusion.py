"""What a detection is by the truth, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regionclip.data.annotations import CocoDetection
from regionclip.metrics.matching import OUTCOMES, MatchResult, match_to_ground_truth

CATEGORIES = {"cat": 1, "dog": 2, "cow": 5}
CAT, DOG, COW, NONE = range(4)


def detection(image: int, name: str, box: list[float], score: float, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": CATEGORIES[name], "bbox": box, "score": score, **more}


RESULTS = [
    detection(1, "cat", [0, 0, 20, 19], 0.9),  # right
    detection(1, "cat", [0, 0, 20, 18], 0.8),  # the same cat again
    detection(1, "dog", [0, 0, 20, 20], 0.7),  # the cat, called a dog
    detection(1, "cow", [60, 60, 20, 20], 0.6),  # nothing is there
    detection(2, "dog", [10, 10, 40, 40], 0.95),  # right
    detection(2, "dog", [0, 60, 10, 10], 0.85),  # in a crowd of dogs
    detection(2, "cat", [0, 60, 10, 10], 0.5),  # in a crowd of dogs, called a cat
    detection(3, "cow", [50, 50, 20, 20], 0.4, forgiven=True),  # nobody boxed all cows here
    detection(3, "cow", [0, 0, 20, 20], 0.05),  # right, and less sure than any mistake
]
WORDS = {
    0.95: "correct",
    0.9: "correct",
    0.85: "ignored",
    0.8: "duplicate",
    0.7: "misclassified",
    0.6: "background",
    0.5: "background",
    0.4: "ignored",
    0.05: "correct",
}


@pytest.fixture
def truth(tmp_path: Path) -> CocoDetection:
    boxes = [
        (1, 1, [0, 0, 20, 20], 0),
        (2, 2, [10, 10, 40, 42], 0),
        (2, 2, [0, 50, 60, 50], 1),
        (3, 5, [0, 0, 20, 20], 0),
        (3, 1, [70, 70, 20, 20], 0),
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in (1, 2, 3, 4)],
        "categories": [{"id": number, "name": name} for name, number in CATEGORIES.items()],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for n, (image, category, box, crowd) in enumerate(boxes)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return CocoDetection(tmp_path / "instances.json", None)


@pytest.fixture
def matches(truth: CocoDetection) -> MatchResult:
    return match_to_ground_truth(truth, RESULTS)


def test_every_detection_has_its_verdict(matches: MatchResult):
    words = dict(zip(matches.scores.tolist(), (OUTCOMES[v] for v in matches.outcomes), strict=True))
    assert words == WORDS
    dog = matches.scores.tolist().index(0.7)
    assert matches.object_labels[matches.shown[dog]] == CAT
    assert matches.boxes[dog].tolist() == [0, 0, 20, 20]
    assert matches.shown[matches.scores.tolist().index(0.6)] == -1


def test_the_best_threshold_is_where_f1_is_highest(matches: MatchResult):
    # Two right ones of two, four objects: F1 is 2 * 2 / (2 + 4); with the last one it is 2 * 3 / (7 + 4).
    assert matches.best_threshold() == 0.9


def test_the_matrix_counts_names_false_alarms_and_misses(matches: MatchResult):
    wanted = np.zeros((4, 4), dtype=int)
    wanted[CAT, CAT] = wanted[DOG, DOG] = wanted[COW, COW] = 1
    wanted[CAT, DOG] = 1
    wanted[NONE, CAT] = 2
    wanted[NONE, COW] = 1
    wanted[CAT, NONE] = 1
    assert matches.matrix(0.0).tolist() == wanted.tolist()
    sure = matches.matrix(0.9)
    assert (sure[CAT, CAT], sure[DOG, DOG], sure.sum()) == (1, 1, 4)
    assert sure[COW, NONE] == sure[CAT, NONE] == 1


def test_missed_objects_are_those_that_no_detection_fits(matches: MatchResult):
    assert matches.object_labels[matches.missed(0.0)].tolist() == [CAT]
    assert matches.object_labels[matches.missed(2.0)].tolist() == [CAT, DOG, COW, CAT]


def test_names_that_never_fit_are_noticed(truth: CocoDetection, matches: MatchResult):
    assert not matches.names_do_not_fit()
    shifted = {"cat": "dog", "dog": "cow", "cow": "cat"}
    numbers = {CATEGORIES[name]: CATEGORIES[other] for name, other in shifted.items()}
    wrong = [entry | {"category_id": numbers[entry["category_id"]]} for entry in RESULTS[:1] + RESULTS[4:5]]
    assert match_to_ground_truth(truth, wrong).names_do_not_fit()
    assert not match_to_ground_truth(truth, [detection(4, "cow", [0, 0, 9, 9], 0.5)]).names_do_not_fit()


def test_nothing_detected_is_all_missed(truth: CocoDetection):
    empty = match_to_ground_truth(truth, [])
    assert empty.best_threshold() == float("inf")
    assert empty.matrix(float("inf"))[:, NONE].tolist() == [2, 1, 1, 0]
