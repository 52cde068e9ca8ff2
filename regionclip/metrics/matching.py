"""What detections are by the truth: right, of a wrong name, found twice, on nothing; and what was missed."""

# D detections of an image, G true boxes; N and O detections and objects of all images, C names
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.structures.boxes import area, intersection, iou, xywh_to_xyxy

VERDICTS = ("correct", "misclassified", "duplicate", "background", "ignored")
RIGHT, WRONG_NAME, TWICE, NO_OBJECT, NOT_JUDGED = range(len(VERDICTS))
IOU = 0.5

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class MatchResult:
    """Detections and objects of all images, matched at IoU 0.5; labels count `names`.

    Attributes:
        names: C categories.
        images: [N] image ids.
        boxes: [N, 4] x1, y1, x2, y2.
        labels: [N] what was named.
        scores: [N].
        verdicts: [N] places in VERDICTS. Objects go to detections of their name, the best scored first.
            "ignored": in a crowd of its name, or of a category that is not annotated exhaustively there.
        shown: [N] the object that the detection fits best, a place in the objects; -1: none.
        object_images: [O] image ids.
        object_boxes: [O, 4].
        object_labels: [O].
    """

    names: tuple[str, ...]
    images: Ints
    boxes: NDArray[np.float64]
    labels: Ints
    scores: NDArray[np.float64]
    verdicts: Ints
    shown: Ints
    object_images: Ints
    object_boxes: NDArray[np.float64]
    object_labels: Ints

    def best_threshold(self) -> float:
        """Returns the score from which on right detections and missed objects balance best (F1).

        Nothing right: infinity, so that nothing is taken for a detection.
        """
        judged = np.flatnonzero(self.verdicts != NOT_JUDGED)
        order = judged[(-self.scores[judged]).argsort(kind="stable")]
        right = (self.verdicts[order] == RIGHT).cumsum()
        if not right.size or not right[-1]:
            return float("inf")
        f1 = 2 * right / (np.arange(1, len(order) + 1) + len(self.object_labels))
        return float(self.scores[order[f1.argmax()]])

    def names_do_not_fit(self) -> bool:
        """Whether the boxes fit many objects and yet hardly one is called by its name."""
        fitting = self.shown >= 0
        found = len(np.unique(self.shown[fitting]))
        right = int((self.verdicts == RIGHT).sum())
        return found > len(self.object_labels) / 5 and right < found / 10

    def missed(self, threshold: float) -> Ints:
        """Returns the objects that no detection from `threshold` on fits, whatever its name."""
        fitting = self.shown[(self.scores >= threshold) & (self.shown >= 0)]
        return np.setdiff1d(np.arange(len(self.object_labels)), fitting)

    def matrix(self, threshold: float) -> Ints:
        """Counts detections from `threshold` on by what they show, and missed objects.

        Returns:
            [C + 1, C + 1]. Row a, column b: detections called b that show an object a. Last row: called b and
                showing nothing, or an object that was found already. Last column: objects a that were missed.
        """
        size = len(self.names) + 1
        kept = self.scores >= threshold
        named = kept & np.isin(self.verdicts, (RIGHT, WRONG_NAME))
        alarms = self.labels[kept & np.isin(self.verdicts, (TWICE, NO_OBJECT))]
        missed = self.object_labels[self.missed(threshold)]
        rows = [self.object_labels[self.shown[named]], np.full(len(alarms), size - 1), missed]
        columns = [self.labels[named], alarms, np.full(len(missed), size - 1)]
        cells = np.concatenate(rows) * size + np.concatenate(columns)
        return np.bincount(cells, minlength=size**2).reshape(size, size)


def match_to_ground_truth(truth: CocoDetection, results: Sequence[Mapping[str, Any]]) -> MatchResult:
    """Matches detections with the truth.

    Args:
        truth: the evaluated categories' annotations.
        results: detections of these categories, with `forgiven` as `regionclip.metrics.lvis.counted` says.
    """
    label_of = {category: label for label, category in enumerate(truth.category_ids)}
    of_image: dict[int, list[Mapping[str, Any]]] = {}
    for entry in results:
        of_image.setdefault(entry["image_id"], []).append(entry)
    columns: list[list[NDArray[Any]]] = []
    objects = 0
    singles = []
    for record in truth:
        single = record.without_crowds()
        singles.append(single)
        entries = sorted(of_image.get(record.image_id, ()), key=lambda entry: -entry["score"])
        if entries:
            boxes = xywh_to_xyxy(torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64))
            labels = np.array([label_of[entry["category_id"]] for entry in entries])
            verdicts, shown = _judge_image(boxes, labels, record, single)
            forgiven = np.array([bool(entry.get("forgiven")) for entry in entries])
            verdicts[forgiven & (verdicts >= TWICE)] = NOT_JUDGED
            scores = np.array([entry["score"] for entry in entries], dtype=np.float64)
            images = np.full(len(entries), record.image_id)
            shown = np.where(shown >= 0, shown + objects, -1)
            columns.append([images, boxes.numpy(), labels, scores, verdicts, shown])
        objects += len(single.boxes)
    none = np.zeros(0, dtype=np.int64)
    empty: list[NDArray[Any]] = [none, np.zeros((0, 4)), none, np.zeros(0), none, none]
    images, corners, labels, scores, verdicts, shown = (
        np.concatenate(parts) for parts in zip(empty, *columns, strict=True)
    )
    return MatchResult(
        names=truth.categories,
        images=images,
        boxes=corners,
        labels=labels,
        scores=scores,
        verdicts=verdicts,
        shown=shown,
        object_images=np.repeat([one.image_id for one in singles], [len(one.boxes) for one in singles]),
        object_boxes=torch.cat([torch.zeros(0, 4), *(one.boxes for one in singles)]).double().numpy(),
        object_labels=torch.cat(
            [torch.zeros(0, dtype=torch.int64), *(one.labels for one in singles)]
        ).numpy(),
    )


def _judge_image(
    boxes: torch.Tensor, labels: Ints, record: ImageAnnotations, single: ImageAnnotations
) -> tuple[Ints, Ints]:
    """Returns [D] verdicts and [D] the image's object that each detection shows, -1: none."""
    overlaps = iou(boxes, single.boxes.double()).numpy()  # [D, G], detections by falling score
    same = labels[:, None] == single.labels.numpy()[None]
    verdicts, shown = np.full(len(labels), NO_OBJECT), np.full(len(labels), -1)
    fits = overlaps >= IOU
    for row in np.flatnonzero(fits.any(1)):
        shown[row], verdicts[row] = overlaps[row].argmax(), WRONG_NAME
    free = np.ones(overlaps.shape[1], dtype=bool)
    for row in np.flatnonzero((fits & same).any(1)):
        own = np.where(fits[row] & same[row], overlaps[row], -1.0)
        open_to_it = np.where(free, own, -1.0)
        taken = bool(open_to_it.max() >= 0)
        shown[row] = (open_to_it if taken else own).argmax()
        verdicts[row] = RIGHT if taken else TWICE
        free[shown[row]] &= not taken
    crowds = record.iscrowd
    if bool(crowds.any()):
        # As in COCO, a box lies in a crowd when most of the box does.
        share = intersection(boxes, record.boxes[crowds].double()) / area(boxes).clamp(min=1e-6)[:, None]
        own_crowd = (share >= IOU).numpy() & (labels[:, None] == record.labels[crowds].numpy()[None])
        verdicts[own_crowd.any(1) & (verdicts != RIGHT)] = NOT_JUDGED
    return verdicts, shown
