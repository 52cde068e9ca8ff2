"""Detection of boxes in another format than COCO's x, y, width, height."""

# N boxes
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]

LEAVES = 2.0  # pixels beyond the image's edge that no rounding explains
SHARE = 1.5  # no box in pixels is as small as this, every box in shares of the image is smaller
MANY = 0.2  # of the boxes of a file: a detector seldom leaves the image with so many


def _from_corners(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _from_centers(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], 1)


def _from_negative_sides(boxes: Boxes) -> Boxes:
    return np.concatenate([boxes[:, :2] + np.minimum(boxes[:, 2:], 0), np.abs(boxes[:, 2:])], 1)


# Form: how its numbers become x, y, width, height in the same unit.
FORMS: dict[str, Callable[[Boxes], Boxes]] = {
    "x, y, width, height": lambda boxes: boxes,
    "x1, y1, x2, y2": _from_corners,
    "center x, center y, width, height": _from_centers,
    "x, y, width, height with negative sides": _from_negative_sides,
}


def other_forms(boxes: Boxes, sizes: Boxes) -> dict[str, Boxes]:
    """Returns the forms that boxes are more likely written in than COCO's, and what they then mean.

    Boxes of COCO's format have no negative sides, are larger than a pixel and seldom leave their image.

    Args:
        boxes: [N, 4] as read for x, y, width, height in pixels; finite.
        sizes: [N, 2] height and width of each one's image; NaN where it is not known.

    Returns:
        Name of the form -> [N, 4] x, y, width, height in pixels; empty where nothing is suspicious.
    """
    if not len(boxes):
        return {}
    scale = sizes[:, [1, 0, 1, 0]]
    in_shares = bool((np.abs(boxes) <= SHARE).all()) and bool(np.nanmax(sizes, initial=0) > 8 * SHARE)
    if not in_shares and not _suspicious(boxes, scale):
        return {}
    unit = scale if in_shares else np.ones_like(scale)
    found = {}
    for name, convert in FORMS.items():
        pixels = convert(boxes) * unit
        if (in_shares or name != next(iter(FORMS))) and not _suspicious(pixels, scale):
            found[name + (" in shares of the image" if in_shares else "")] = pixels
    return found


def _suspicious(boxes: Boxes, scale: Boxes) -> bool:
    """Whether boxes [N, 4] x, y, width, height have negative sides or often leave images of `scale`."""
    ends = boxes[:, :2] + boxes[:, 2:]
    leaves = (boxes[:, :2] < -LEAVES).any(1) | (ends > scale[:, :2] + LEAVES).any(1)  # False for NaN
    return bool((boxes[:, 2:] < 0).any()) or float(leaves.mean()) > MANY
