"""The matching of boxes to ground truth: correct, misclassified, duplicate or background; missed objects."""

# D detections of an image, G true boxes; N and O detections and objects of all images, C names
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.structures.boxes import area, intersection, iou, xywh_to_xyxy

OUTCOMES = ("correct", "misclassified", "duplicate", "background", "ignored")
CORRECT, MISCLASSIFIED, DUPLICATE, BACKGROUND, IGNORED = range(len(OUTCOMES))
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
        outcomes: [N] places in OUTCOMES. Objects go to detections of their name, the best scored first.
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
    outcomes: Ints
    shown: Ints
    object_images: Ints
    object_boxes: NDArray[np.float64]
    object_labels: Ints

    def best_threshold(self) -> float:
        """Returns the score from which on right detections and missed objects balance best (F1).

        Nothing right: infinity, so that nothing is taken for a detection.
        """
        counted = np.flatnonzero(self.outcomes != IGNORED)
        order = counted[(-self.scores[counted]).argsort(kind="stable")]
        right = (self.outcomes[order] == CORRECT).cumsum()
        if not right.size or not right[-1]:
            return float("inf")
        f1 = 2 * right / (np.arange(1, len(order) + 1) + len(self.object_labels))
        return float(self.scores[order[f1.argmax()]])

    def names_do_not_fit(self) -> bool:
        """Whether the boxes fit many objects and yet hardly one is called by its name."""
        fitting = self.shown >= 0
        found = len(np.unique(self.shown[fitting]))
        right = int((self.outcomes == CORRECT).sum())
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
        named = kept & np.isin(self.outcomes, (CORRECT, MISCLASSIFIED))
        alarms = self.labels[kept & np.isin(self.outcomes, (DUPLICATE, BACKGROUND))]
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
            outcomes, shown, _ = match_image(boxes, labels, record)
            forgiven = np.array([bool(entry.get("forgiven")) for entry in entries])
            outcomes[forgiven & (outcomes >= DUPLICATE)] = IGNORED
            scores = np.array([entry["score"] for entry in entries], dtype=np.float64)
            images = np.full(len(entries), record.image_id)
            shown = np.where(shown >= 0, shown + objects, -1)
            columns.append([images, boxes.numpy(), labels, scores, outcomes, shown])
        objects += len(single.boxes)
    none = np.zeros(0, dtype=np.int64)
    empty: list[NDArray[Any]] = [none, np.zeros((0, 4)), none, np.zeros(0), none, none]
    images, corners, labels, scores, outcomes, shown = (
        np.concatenate(parts) for parts in zip(empty, *columns, strict=True)
    )
    return MatchResult(
        names=truth.categories,
        images=images,
        boxes=corners,
        labels=labels,
        scores=scores,
        outcomes=outcomes,
        shown=shown,
        object_images=np.repeat([one.image_id for one in singles], [len(one.boxes) for one in singles]),
        object_boxes=torch.cat([torch.zeros(0, 4), *(one.boxes for one in singles)]).double().numpy(),
        object_labels=torch.cat(
            [torch.zeros(0, dtype=torch.int64), *(one.labels for one in singles)]
        ).numpy(),
    )


def match_image(
    boxes: Tensor, labels: Ints, annotations: ImageAnnotations, threshold: float = IOU, once: bool = True
) -> tuple[Ints, Ints, Ints]:
    """Matches the boxes of one image to its objects.

    Args:
        boxes: [D, 4] (x1, y1, x2, y2) in pixels of the original image; with `once` the most confident first.
        labels: [D] what each box is called; -1, a name outside the annotations, is ignored.
        annotations: the image's objects, crowds included.
        threshold: IoU from which on a box shows an object.
        once: each object goes to one box of its name, the first that comes; others that fit only it are
            duplicates. Otherwise every box that fits an object of its name is correct.

    Returns:
        [D] places in OUTCOMES; [D] the object that each box shows, an index of single objects, -1: none;
        and [E, 2] each correct box with each object that it stands for.
    """
    single = annotations.without_crowds()
    overlaps = iou(boxes.double(), single.boxes.double()).numpy()  # [D, G]
    outcomes, shown = np.full(len(labels), BACKGROUND), np.full(len(labels), -1)
    fits = overlaps >= threshold
    fitting = fits.any(1)
    if overlaps.shape[1]:
        shown[fitting] = overlaps[fitting].argmax(1)
    outcomes[fitting] = MISCLASSIFIED
    same = fits & (labels[:, None] == single.labels.numpy()[None])
    pairs = np.argwhere(same)
    if once:
        pairs = _assign(overlaps, same, outcomes, shown)
    outcomes[pairs[:, 0]] = CORRECT
    if bool(annotations.iscrowd.any()):
        # As in COCO, a box is in a crowd when most of the box is.
        crowds = annotations.boxes[annotations.iscrowd].double()
        covered = intersection(boxes.double(), crowds) / area(boxes.double()).clamp(min=1e-6)[:, None]
        crowd_labels = annotations.labels[annotations.iscrowd].numpy()
        in_crowd = (covered >= threshold).numpy() & (labels[:, None] == crowd_labels[None])
        outcomes[in_crowd.any(1) & (outcomes != CORRECT)] = IGNORED
    outcomes[labels < 0] = IGNORED
    return outcomes, shown, pairs


def _assign(overlaps: NDArray[np.float64], same: NDArray[np.bool_], outcomes: Ints, shown: Ints) -> Ints:
    """Gives each object to the first box of its name that fits it best; notes duplicates in `outcomes`.

    Returns:
        [E, 2] boxes and their objects.
    """
    free = np.ones(overlaps.shape[1], dtype=bool)
    pairs = []
    for row in np.flatnonzero(same.any(1)):
        own = np.where(same[row], overlaps[row], -1.0)
        unclaimed = np.where(free, own, -1.0)
        taken = bool(unclaimed.max() >= 0)
        shown[row] = (unclaimed if taken else own).argmax()
        if taken:
            pairs.append((row, shown[row]))
            free[shown[row]] = False
        else:
            outcomes[row] = DUPLICATE
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
