"""Results whose entries have names: images and categories are found by them, what is ambiguous is refused."""

from __future__ import annotations

from typing import Any

import pytest

from clip_base.runtime.errors import InputError
from regionclip.data.results import read_results

Entry = dict[str, Any]
IMAGES = {7: "10.jpg", 9: "2.jpg", 20: "sub/2.jpg"}
IDS = {"cup": 3, "sports_ball": 5}


def result(image_id: int, category_id: int = 3, **names: str) -> Entry:
    return {"image_id": image_id, "category_id": category_id, "bbox": [0, 0, 9, 9], "score": 0.5, **names}


def images_of(*entries: Entry) -> list[int]:
    return [entry["image_id"] for entry in read_results(list(entries), IMAGES, "truth.json", IDS).entries]


def test_an_image_is_the_one_of_its_file_name_whatever_its_number() -> None:
    entries = [
        result(1, file_name="photos/10.jpg"),
        result(2, file_name="photos/2.jpg"),
        result(2, file_name="photos/2.jpg"),
        result(9, file_name="/data/photos/sub/2.jpg"),
    ]
    assert images_of(*entries) == [7, 9, 9, 20]
    (note,) = read_results(entries, IMAGES, "truth.json", IDS).notes
    assert "the image_id of 3 of 3 images is another one" in note


def test_names_that_agree_with_the_numbers_are_not_worth_a_note() -> None:
    read = read_results([result(7, file_name="10.jpg", category_name="cup")], IMAGES, "truth.json", IDS)
    assert read.notes == ()
    assert read.entries[0]["image_id"] == 7


def test_numbers_without_names_are_the_annotations_own() -> None:
    assert images_of(result(7), result(20)) == [7, 20]
    named = [result(7, file_name="whatever.jpg")]
    assert read_results(named, dict.fromkeys(IMAGES, ""), "truth.json").entries[0]["image_id"] == 7


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([result(1, file_name="5.jpg")], "truth.json has no image 5.jpg"),
        ([result(1, file_name="other/sub/3.jpg")], "has no image other/sub/3.jpg"),
        ([result(1, file_name="10.jpg"), result(7)], r"1 of 2 detections have a file_name, but results\[1\]"),
        (
            [result(1, file_name="10.jpg"), result(1, file_name="2.jpg")],
            "image_id 1 is used for both 10.jpg and 2.jpg",
        ),
        (
            [result(1, file_name="a/10.jpg"), result(2, file_name="b/10.jpg")],
            "a/10.jpg and b/10.jpg both mean the image with id 7 of truth.json",
        ),
    ],
)
def test_names_that_are_ambiguous_or_contradict_the_numbers_are_refused(
    entries: list[Entry], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        images_of(*entries)


def test_a_name_that_two_images_have_is_refused() -> None:
    images = {1: "a/2.jpg", 2: "b/2.jpg"}
    with pytest.raises(InputError, match=r"'2\.jpg' means several images of truth"):
        read_results([result(1, file_name="2.jpg")], images, "truth.json")


def test_a_category_is_the_one_of_its_name() -> None:
    entries = [
        result(7, 1, category_name="sports ball"),
        result(7, 2, category_name="cup"),
        result(7, 3, category_name="zebra"),
    ]
    read = read_results(entries, IMAGES, "truth.json", IDS)
    assert [entry["category_id"] for entry in read.entries] == [5, 3]
    assert read.unknown == 1
    assert "categories are found by category_name" in read.notes[0]
    with pytest.raises(InputError, match="no category_name, such as 'cupp', is a category"):
        read_results([result(7, 3, category_name="cupp")], IMAGES, "truth.json", IDS)
