"""Boxes in another form than COCO's are recognized; boxes in COCO's format never are."""

from __future__ import annotations

import numpy as np
import pytest

from regionclip.data.box_format import other_forms

SIZE = (480.0, 640.0)  # height, width


def truth(count: int = 60, seed: int = 0) -> np.ndarray:
    """[N, 4] x, y, width, height within the image."""
    random = np.random.default_rng(seed)
    corners = np.sort(random.uniform(0, [640, 480], (count, 2, 2)), axis=1)
    sides = np.maximum(corners[:, 1] - corners[:, 0], 4)
    return np.concatenate([np.minimum(corners[:, 0], [636, 476]), sides], 1)


def written(boxes: np.ndarray, form: str) -> np.ndarray:
    x, y, w, h = boxes.T
    columns = {
        "x1, y1, x2, y2": (x, y, x + w, y + h),
        "center x, center y, width, height": (x + w / 2, y + h / 2, w, h),
        "negative": (x + w, y + h, -w, -h),
        "x, y, width, height": (x, y, w, h),
    }
    return np.stack(columns[form], 1)


def sizes(count: int) -> np.ndarray:
    return np.tile(SIZE, (count, 1))


@pytest.mark.parametrize("seed", range(5))
def test_boxes_of_cocos_form_are_not_suspected(seed: int) -> None:
    boxes = truth(seed=seed)
    assert other_forms(boxes, sizes(60)) == {}
    assert other_forms(boxes + np.random.default_rng(seed).normal(0, 0.5, boxes.shape), sizes(60)) == {}
    assert other_forms(boxes, np.full((60, 2), np.nan)) == {}
    assert other_forms(np.zeros((0, 4)), np.zeros((0, 2))) == {}


@pytest.mark.parametrize("form", ["x1, y1, x2, y2", "center x, center y, width, height"])
def test_other_corners_are_named_and_turned_into_pixels(form: str) -> None:
    found = other_forms(written(truth(), form), sizes(60))
    np.testing.assert_allclose(found[form], truth(), atol=1e-9)


def test_negative_sides_are_named_and_turned_round() -> None:
    found = other_forms(written(truth(), "negative"), sizes(60))
    np.testing.assert_allclose(found["x, y, width, height with negative sides"], truth(), atol=1e-9)


@pytest.mark.parametrize(
    "form", ["x, y, width, height", "x1, y1, x2, y2", "center x, center y, width, height"]
)
def test_shares_of_the_image_are_named_and_multiplied(form: str) -> None:
    shares = written(truth(), form) / np.array([640, 480, 640, 480])
    found = other_forms(shares, sizes(60))
    np.testing.assert_allclose(found[f"{form} in shares of the image"], truth(), atol=1e-9)


def test_a_few_boxes_that_leave_the_image_are_not_enough() -> None:
    boxes = truth()
    boxes[:6, 2:] += 700
    assert other_forms(boxes, sizes(60)) == {}
