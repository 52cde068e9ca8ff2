"""Mined region-phrase pairs against the truth: which are right, and how many true objects they name."""

# P pairs of an image, G true boxes
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regionclip.boxes import area, intersection, iou
from regionclip.datasets import CocoDetection
from regionclip.evaluation import NOTHING


@dataclass(frozen=True)
class Pair:
    """A mined region and the phrase that was given to it.

    Attributes:
        image_id: as in the annotations.
        box: (x1, y1, x2, y2) in pixels of the original image.
        name: the phrase.
    """

    image_id: int
    box: tuple[float, float, float, float]
    name: str


def judge_pairs(
    pairs: Sequence[Pair],
    truth: CocoDetection,
    canonical: Callable[[str], str | None] | None = None,
    threshold: float = 0.5,
) -> list[str]:
    """Says of each mined pair whether it is true.

    Args:
        pairs: mined pairs.
        truth: the images' annotations, crowds included.
        canonical: turns a phrase into a category's name, or None when it names no category; without one a
            phrase must equal the name, whatever its case.
        threshold: the IoU from which on a box is taken to show an object.

    Returns:
        A word for each pair: "right" (it shows an object of that name); "wrong name" (it shows an object, but
            none of
        that name); "no object"; "unknown" (the annotations have no such image or category, or it lies in a
        crowd of that name: it cannot be judged).
    """
    name_of = canonical or _same_name(truth.categories)
    label_of = {name: label for label, name in enumerate(truth.categories)}
    record_of = {record.image_id: record for record in truth}
    verdicts = ["unknown"] * len(pairs)
    for image_id, places in _by_image(pairs).items():
        record = record_of.get(image_id)
        if record is None:
            continue
        boxes = torch.tensor([pairs[place].box for place in places], dtype=torch.float32)  # [P, 4]
        single = record.without_crowds()
        shows = iou(boxes, single.boxes) >= threshold  # [P, G]
        crowds, crowd_labels = record.boxes[record.iscrowd], record.labels[record.iscrowd]
        # As in COCO, a box lies in a crowd when most of the box does.
        within = intersection(boxes, crowds) >= threshold * area(boxes).clamp(min=1e-6)[:, None]
        for row, place in enumerate(places):
            label = label_of.get(name_of(pairs[place].name) or "")
            if label is None:
                continue
            if bool((shows[row] & (single.labels == label)).any()):
                verdicts[place] = "right"
            elif not bool((within[row] & (crowd_labels == label)).any()):
                verdicts[place] = "wrong name" if bool(shows[row].any()) else "no object"
    return verdicts


def precision_recall_of_pairs(
    pairs: Sequence[Pair],
    truth: CocoDetection,
    novel: Iterable[str] = (),
    canonical: Callable[[str], str | None] | None = None,
    threshold: float = 0.5,
) -> dict[str, float]:
    """How true mined region-phrase pairs are, and how many of the true objects they name.

    Args:
        pairs: mined pairs.
        truth: the images' annotations, of base and novel categories.
        novel: names of the novel categories.
        canonical: see `judge_pairs`.
        threshold: see `judge_pairs`.

    Returns:
        pairs and judged (numbers); of the judged ones the shares precision (right), wrong_name and no_object;
        recall, the share of true boxes that a right pair covers. precision, wrong_name, no_object and recall
        also with _base and _novel: by the pair's name, and for recall by the true box's.
    """
    name_of = canonical or _same_name(truth.categories)
    verdicts = judge_pairs(pairs, truth, name_of, threshold)
    novel_names = set(novel)
    is_novel = [name_of(pair.name) in novel_names for pair in pairs]
    metrics: dict[str, float] = {
        "pairs": len(pairs),
        "judged": sum(verdict != "unknown" for verdict in verdicts),
    }
    keys = {"precision": "right", "wrong_name": "wrong name", "no_object": "no object"}
    found = _found_boxes(pairs, verdicts, truth, name_of, threshold)
    novel_labels = torch.tensor([name in novel_names for name in truth.categories], dtype=torch.bool)
    labels = torch.cat(
        [torch.zeros(0, dtype=torch.int64), *(record.without_crowds().labels for record in truth)]
    )
    for suffix, wanted in (("", None), ("_base", False), ("_novel", True)):
        judged = [
            verdict
            for verdict, one in zip(verdicts, is_novel, strict=True)
            if verdict != "unknown" and wanted in (None, one)
        ]
        for key, verdict in keys.items():
            metrics[key + suffix] = judged.count(verdict) / len(judged) if judged else NOTHING
        mine = found if wanted is None else found[novel_labels[labels] == wanted]
        metrics["recall" + suffix] = float(mine.float().mean()) if len(mine) else NOTHING
    return metrics


def _found_boxes(
    pairs: Sequence[Pair],
    verdicts: Sequence[str],
    truth: CocoDetection,
    name_of: Callable[[str], str | None],
    threshold: float,
) -> Tensor:
    """Returns [G] bool for all single true boxes in order: whether a right pair of its own name covers it."""
    label_of = {name: label for label, name in enumerate(truth.categories)}
    right = _by_image(pairs, [verdict == "right" for verdict in verdicts])
    found = [torch.zeros(0, dtype=torch.bool)]
    for record in truth:
        single = record.without_crowds()
        mine = [pairs[place] for place in right.get(record.image_id, [])]
        boxes = torch.tensor([pair.box for pair in mine], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([label_of[name_of(pair.name) or ""] for pair in mine], dtype=torch.int64)
        same = labels[:, None] == single.labels[None]  # [P, G]
        found.append(((iou(boxes, single.boxes) >= threshold) & same).any(0))
    return torch.cat(found)


def _by_image(pairs: Sequence[Pair], which: Sequence[bool] | None = None) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for place, pair in enumerate(pairs):
        if which is None or which[place]:
            places.setdefault(pair.image_id, []).append(place)
    return places


def _same_name(categories: Sequence[str]) -> Callable[[str], str | None]:
    names = {name.casefold(): name for name in categories}
    return lambda phrase: names.get(phrase.strip().casefold())
