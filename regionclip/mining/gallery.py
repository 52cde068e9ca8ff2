"""Validation scenes on the quickstart's page: the detections drawn, and which true objects they found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from clip_base.images.decode import decode
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.data.categories import Split
from regionclip.metrics.matching import NO_OBJECT, RIGHT, WRONG_NAME, MatchResult, match_to_ground_truth
from regionclip.reports.crops import RGB, Crop, data_uri
from regionclip.structures.drawing import draw

SCENES = 12
MAX_DRAWN = 10  # a detector that has learned nothing would cover a scene with boxes
BLUE: RGB = (47, 111, 208)
ORANGE: RGB = (235, 135, 30)
GRAY: RGB = (120, 124, 130)


@dataclass(frozen=True)
class LabeledScene:
    """A scene with its detections drawn, and which of its true objects they found and missed, as text."""

    crop: Crop
    found: str
    missed: str


def labeled_scenes(
    truth: CocoDetection, results: Sequence[Mapping[str, Any]], split: Split
) -> tuple[float, list[LabeledScene]]:
    """Returns the score from which on detections are drawn, and the scenes.

    The score is the one at which precision and recall balance best (F1) over all scenes of `truth`, or 0.5
    where no detection is correct.

    Args:
        truth: annotations of the split's categories.
        results: detections of these categories, in COCO's format.
        split: base and novel categories.
    """
    judged = match_to_ground_truth(truth, results)
    best = judged.best_threshold()
    threshold = best if isfinite(best) else 0.5
    return threshold, [_scene(record, judged, threshold, split) for record in pick_scenes(truth, split.novel)]


def pick_scenes(truth: CocoDetection, novel: Sequence[str], count: int = SCENES) -> list[ImageAnnotations]:
    """Picks scenes by what the truth says is in them, never by how well they were detected.

    Three quarters hold novel objects, each novel category in turn with the earliest scene left that shows it;
    the rest are the earliest scenes with base objects alone. Where one kind runs out, the other fills up.

    Returns:
        At most `count` records, in the file's order.
    """
    labels = [truth.categories.index(name) for name in novel if name in truth.categories]
    holding = {label: [r for r in truth if bool((r.labels == label).any())] for label in labels}
    chosen: dict[int, ImageAnnotations] = {}
    wanted = count * 3 // 4
    while len(chosen) < wanted:
        before = len(chosen)
        for label in labels:
            fresh = next((r for r in holding[label] if r.image_id not in chosen), None)
            if fresh is not None and len(chosen) < wanted:
                chosen[fresh.image_id] = fresh
        if len(chosen) == before:
            break
    with_novel = {record.image_id for records in holding.values() for record in records}
    only_base = [r for r in truth if len(r.labels) and r.image_id not in with_novel]
    for record in [*only_base, *truth]:
        if len(chosen) >= count:
            break
        chosen[record.image_id] = record
    return [record for record in truth if record.image_id in chosen]


def _scene(record: ImageAnnotations, judged: MatchResult, threshold: float, split: Split) -> LabeledScene:
    names = [f"★ {name}" if name in split.novel else name for name in judged.names]
    drawn = np.flatnonzero((judged.images == record.image_id) & (judged.scores >= threshold))[:MAX_DRAWN]
    texts: list[str] = []
    colors: list[RGB] = []
    for place in drawn[::-1]:  # the best last, on top
        is_false = judged.verdicts[place] in (WRONG_NAME, NO_OBJECT)
        name = names[judged.labels[place]]
        texts.append(f"{'✗ ' * is_false}{name} {judged.scores[place]:.2f}")
        colors.append(GRAY if is_false else ORANGE if name.startswith("★") else BLUE)
    boxes = judged.boxes[drawn[::-1]].tolist()
    image = draw(decode(record.path), boxes=boxes, texts=texts, colours=colors)
    objects = np.flatnonzero(judged.object_images == record.image_id)
    taken = judged.shown[drawn[judged.verdicts[drawn] == RIGHT]]
    is_found = np.isin(objects, taken)
    return LabeledScene(
        Crop(data_uri(image), f"detections in {record.path.name}"),
        _counted(names[label] for label in judged.object_labels[objects[is_found]]),
        _counted(names[label] for label in judged.object_labels[objects[~is_found]]),
    )


def _counted(names: Iterable[str]) -> str:
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in Counter(names).items())
