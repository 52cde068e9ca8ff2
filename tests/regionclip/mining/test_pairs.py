"""Mined pairs against the truth: outcomes, shares and recall equal what is counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clip_base.storage.files import write_json
from regionclip.data.annotations import CocoDetection
from regionclip.mining.quality import Pair, canonical_name, label_pairs

# One cat, one cow, a crowd of dogs; a second image with a dog alone.
TRUTH = {
    "images": [
        {"id": 1, "file_name": "1.jpg", "height": 100, "width": 100},
        {"id": 2, "file_name": "2.jpg", "height": 100, "width": 100},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20]},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [50, 50, 20, 20]},
        {"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 50, 40, 50], "iscrowd": 1},
        {"id": 4, "image_id": 2, "category_id": 2, "bbox": [10, 10, 50, 50]},
    ],
}
PAIRS = [
    Pair(1, (0, 0, 20, 19), "Cat"),
    Pair(1, (0, 0, 20, 18), "cow"),
    Pair(1, (50, 50, 70, 70), "cow"),
    Pair(1, (80, 0, 90, 10), "cat"),
    Pair(1, (5, 60, 10, 70), "dog"),
    Pair(1, (5, 60, 10, 70), "cat"),
    Pair(1, (0, 0, 20, 20), "grass"),
    Pair(9, (0, 0, 20, 20), "cat"),
]


@pytest.fixture
def truth(tmp_path: Path) -> CocoDetection:
    write_json(tmp_path / "truth.json", TRUTH)
    return CocoDetection(tmp_path / "truth.json", None)


def test_pairs_are_right_wrong_or_nothing(truth: CocoDetection):
    wanted = [
        "correct",
        "misclassified",
        "correct",
        "background",
        "ignored",
        "background",
        "ignored",
        "ignored",
    ]
    assert label_pairs(PAIRS, truth).words() == wanted
    assert label_pairs(PAIRS[6:7], truth, canonical={"grass": "cat"}.get).words() == ["correct"]


def test_precision_goes_by_the_name_given_and_recall_by_the_object(truth: CocoDetection):
    found = label_pairs(PAIRS, truth).metrics(base=["cat"], novel=["cow"])
    assert (found["pairs"], found["evaluated"], found["evaluated_base"], found["evaluated_novel"]) == (
        8,
        5,
        3,
        2,
    )
    assert (found["precision"], found["misclassified"], found["background"]) == pytest.approx((0.4, 0.2, 0.4))
    assert (found["precision_base"], found["precision_novel"]) == pytest.approx((1 / 3, 1 / 2))
    assert (found["recall"], found["recall_base"], found["recall_novel"]) == pytest.approx((2 / 3, 1, 1))


def test_a_category_in_neither_part_of_a_split_counts_for_neither(truth: CocoDetection):
    pairs = [Pair(2, (10, 10, 60, 60), "dog"), Pair(1, (0, 0, 20, 20), "dog")]
    found = label_pairs(pairs, truth).metrics(base=["cat"], novel=["cow"])
    assert (found["precision"], found["recall"]) == pytest.approx((0.5, 1 / 3))
    assert (found["precision_base"], found["precision_novel"], found["recall_base"]) == (-1, -1, 0)


def test_pairs_left_out_find_nothing(truth: CocoDetection):
    kept = torch.tensor([True] * 2 + [False] * 6)
    found = label_pairs(PAIRS, truth).metrics(["cat"], ["cow"], kept)
    assert (found["pairs"], found["evaluated"], found["precision"]) == (2, 2, 0.5)
    assert (found["recall_base"], found["recall_novel"]) == (1, 0)
    assert found["precision_novel"] == 0


def test_images_that_were_not_mined_do_not_count(truth: CocoDetection):
    assert label_pairs(PAIRS, truth, images={1}).metrics()["recall"] == 1
    assert label_pairs([Pair(2, (10, 10, 60, 60), "dog")], truth, images={1}).words() == ["ignored"]


def test_no_pairs_find_nothing(truth: CocoDetection):
    nothing = label_pairs([], truth).metrics(["cat"], ["cow"])
    assert (nothing["precision"], nothing["recall"], nothing["recall_novel"]) == (-1, 0, 0)


def test_what_was_taken_for_what_is_counted(truth: CocoDetection):
    wrong = [Pair(1, (0, 0, 20, 20), "cow"), Pair(2, (10, 10, 60, 60), "cow"), Pair(1, (0, 0, 20, 19), "cow")]
    assert label_pairs([*wrong, PAIRS[3]], truth).confusions() == [("cow", "cat", 2), ("cow", "dog", 1)]


def test_a_phrase_names_the_category_of_its_last_words():
    categories = ("cat", "Teddy Bear", "hand")
    assert canonical_name("Cat", categories) == "cat"
    assert canonical_name("teddy  bear", categories) == "Teddy Bear"
    assert canonical_name("red teddy bear", categories) == "Teddy Bear"
    assert canonical_name("red cat", categories) == "cat"
    assert canonical_name("second hand shop", categories) is None
    assert canonical_name("", categories) is None
