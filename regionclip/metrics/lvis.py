"""LVIS's federated evaluation: detections count only for categories that were checked in the image.

In LVIS an image is annotated for a few of the 1,203 categories only: those that occur in its boxes and those
in its `neg_category_ids`, which were looked for and are not there. Detections of other categories do not
count. For a category in `not_exhaustive_category_ids` not every object has a box, so that a detection which
fits none is no mistake (arXiv 1908.03195, section 2; the dataset's own tools do it so).
"""

# T IoU thresholds, R recall thresholds, K categories, A area ranges; D detections, G true boxes
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from regionclip.metrics.coco_api import Curves

MOST = 300  # detections per image, of all categories together
IOUS = np.linspace(0.5, 0.95, 10)  # T
RECALLS = np.linspace(0.0, 1.0, 101)  # R
# Square pixels: all, small, medium, large.
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def is_federated(content: dict[str, Any]) -> bool:
    """Whether annotations say what was looked for in each image, as LVIS's do."""
    return any("neg_category_ids" in entry for entry in content["images"])


def counted(
    content: dict[str, Any], results: Sequence[dict[str, Any]], most: int = MOST
) -> list[dict[str, Any]]:
    """Returns the detections that count, with `forgiven`: whether fitting no box is no mistake.

    Args:
        content: annotations whose images have neg_category_ids and not_exhaustive_category_ids.
        results: detections with image_id, category_id and score.
        most: best scored detections per image, of all categories together; the rest is left out before
            anything else.
    """
    known = {entry["id"]: set(entry.get("neg_category_ids") or ()) for entry in content["images"]}
    for entry in content["annotations"]:
        known[entry["image_id"]].add(entry["category_id"])
    partly = {entry["id"]: set(entry.get("not_exhaustive_category_ids") or ()) for entry in content["images"]}
    of_image: dict[int, list[dict[str, Any]]] = {}
    for entry in results:
        of_image.setdefault(entry["image_id"], []).append(entry)
    return [
        {**entry, "forgiven": entry["category_id"] in partly[image]}
        for image, entries in of_image.items()
        for entry in sorted(entries, key=lambda entry: -entry["score"])[:most]
        if entry["category_id"] in known[image]
    ]


@dataclass(frozen=True)
class _Boxes:
    """Boxes of one category: true ones in the file's order, detections by falling score.

    Attributes:
        images: [N] places in the list of images.
        boxes: [N, 4] x, y, width, height.
        outside: [A, N] whether a box's area lies outside the range, so that it does not count there.
        forgiven: [N] whether fitting nothing is no mistake; of detections only.
    """

    images: Ints
    boxes: Floats
    outside: Bools
    forgiven: Bools

    @classmethod
    def of(cls, entries: Sequence[dict[str, Any]], place_of: dict[int, int]) -> _Boxes:
        boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
        areas = np.array([entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in entries])
        outside = (areas < AREAS[:, :1]) | (areas > AREAS[:, 1:])
        forgiven = np.array([bool(entry.get("forgiven")) for entry in entries], dtype=bool)
        images = np.array([place_of[entry["image_id"]] for entry in entries], dtype=np.int64)
        return cls(images, boxes, outside, forgiven)


def with_numpy(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], category_ids: Sequence[int], most: int = MOST
) -> Curves:
    """Computes precision and recall of what `counted` returns; -1 where a category has no true box.

    Args:
        truth: the annotations; boxes of other categories do not matter.
        results: from `counted`.
        category_ids: K categories.
        most: how many detections per image `counted` has left.
    """
    place_of = {image: place for place, image in enumerate(sorted(entry["id"] for entry in truth["images"]))}
    true, found = _by_category(truth["annotations"]), _by_category(results)
    precision = np.full((len(IOUS), len(RECALLS), len(category_ids), len(AREAS)), -1.0)
    recall = np.full((len(IOUS), len(category_ids), len(AREAS), 1), -1.0)
    for k, category in enumerate(category_ids):
        if category in true:
            entries = found.get(category, [])
            entries.sort(key=lambda entry: (-entry["score"], place_of[entry["image_id"]]))
            objects = _Boxes.of(true[category], place_of)
            precision[:, :, k], recall[:, k, :, 0] = _of_category(objects, _Boxes.of(entries, place_of))
    return Curves(precision, recall, (most,))


def _by_category(entries: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        grouped.setdefault(entry["category_id"], []).append(entry)
    return grouped


def _of_category(objects: _Boxes, detections: _Boxes) -> tuple[Floats, Floats]:
    """Returns precision [T, R, A] and recall [T, A]."""
    shape = len(IOUS), len(AREAS), len(detections.images)
    hit, aside = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for rows, columns in _shared_images(detections.images, objects.images):
        overlaps = mask.iou(detections.boxes[rows], objects.boxes[columns], [0] * len(columns))
        hit[:, :, rows], aside[:, :, rows] = match(overlaps, objects.outside[:, columns])
    aside |= ~hit & (detections.outside | detections.forgiven)
    right, wrong, counts = hit & ~aside, ~hit & ~aside, (~objects.outside).sum(-1)
    recall = np.where(counts > 0, right.sum(-1) / np.maximum(counts, 1), -1.0)
    return _at_recalls(right.cumsum(-1), wrong.cumsum(-1), counts), recall


def _shared_images(first: Ints, second: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yields the places of each image that stands in both lists."""
    images = np.intersect1d(first, second)
    yield from zip(_places(first, images), _places(second, images), strict=True)


def _places(values: Ints, wanted: Ints) -> Iterator[Ints]:
    """Yields the places of each wanted value, rising."""
    order = values.argsort(kind="stable")
    starts, ends = (np.searchsorted(values[order], wanted, side) for side in ("left", "right"))
    for start, end in zip(starts, ends, strict=True):
        yield order[start:end]


def match(overlaps: Floats, aside: Bools) -> tuple[Bools, Bools]:
    """Hands the true boxes of an image to its detections, the best scored one first.

    Args:
        overlaps: [D, G] IoU, detections by falling score.
        aside: [A, G] whether a true box does not count; it is taken only where no other fits.

    Returns:
        [T, A, D] whether a detection got a box, and whether that box does not count.
    """
    free = np.ones((len(IOUS), *aside.shape), dtype=bool)  # [T, A, G]
    hit = np.zeros((*free.shape[:2], len(overlaps)), dtype=bool)
    taken_aside = np.zeros_like(hit)
    least = np.minimum(IOUS, 1 - 1e-10)[:, None, None]
    levels, ranges = np.indices(hit.shape[:2])
    for row, overlap in enumerate(overlaps):
        fits = free & (overlap >= least)
        if not fits.any():
            continue
        rank = np.where(fits, overlap - 2 * aside, -3.0)
        best = rank.shape[-1] - 1 - rank[..., ::-1].argmax(-1)  # [T, A], of equal ones the last
        hit[:, :, row] = fits.any(-1)
        taken_aside[:, :, row] = hit[:, :, row] & aside[ranges, best]
        free[levels, ranges, best] &= ~hit[:, :, row]
    return hit, taken_aside


def _at_recalls(right: Ints, wrong: Ints, objects: Ints) -> Floats:
    """Returns [T, R, A]: the best precision at each recall or beyond.

    Args:
        right: [T, A, D] how many of the detections up to each one are right.
        wrong: [T, A, D] and how many are wrong.
        objects: [A] how many objects there are.
    """
    precision = right / (right + wrong + np.spacing(1))
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    table = np.full((len(IOUS), len(RECALLS), len(AREAS)), -1.0)
    for area, count in enumerate(objects.tolist()):
        if not count:
            continue
        for level in range(len(IOUS)):
            first = np.searchsorted(right[level, area] / count, RECALLS, side="left")
            beyond = np.append(envelope[level, area], 0.0)
            table[level, :, area] = beyond[first]
    return table
