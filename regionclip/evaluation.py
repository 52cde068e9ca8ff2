"""How good detections, proposals, labels of true boxes are, for base and novel apart.

Every figure is a fraction in [0, 1], or -1 where there is nothing to measure (pycocotools' convention).
"""

# T IoU thresholds, R recall thresholds, K categories, A area ranges; G true boxes, P proposals, N boxes, C
# names
from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from clip_base.errors import InputError
from regionclip.boxes import iou
from regionclip.coco import category_ids_by_name, read_instances, read_results
from regionclip.splits import Split

NOTHING = -1.0
AREAS = ("all", "small", "medium", "large")
IOU_THRESHOLDS = tuple(float(threshold) for threshold in np.linspace(0.5, 0.95, 10))  # COCO's ten


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_detections` found.

    Attributes:
        metrics: AP, AP50, AP75, APs, APm, APl, AP_all, AP50_all; with a split also AP_base, AP_novel,
            AP50_base, AP50_novel.
        per_class: for each category: name, category_id, novel (None without a split), boxes (true ones that
            count), detections, AP, AP50.
        ignored: results of categories that are not evaluated.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    ignored: int


def evaluate_detections(
    annotations: str | Path | dict[str, Any],
    results: str | Path | Sequence[dict[str, Any]],
    split: Split | None = None,
    max_detections: int = 100,
) -> Evaluation:
    """Average precision of a results file in COCO's form, as pycocotools computes it.

    The categories of the split are evaluated together, base and novel in one vocabulary (the "generalised"
    setting of arXiv 2112.09106, section 4.1); base and novel figures are means over their categories of that
    one evaluation.

    Args:
        annotations: a file in COCO's instances form, or its content.
        results: a results file (a list of image_id, category_id, bbox [x, y, width, height], score), or its
            content.
        split: base and novel categories; None evaluates every category of the annotations.
        max_detections: best scored detections an image and category that count (COCO: 100).

    Raises:
        InputError: a malformed file or entry, a result for an image that the annotations do not have, or a
            split whose names are not in the annotations.
    """
    where = "annotations" if isinstance(annotations, dict) else str(annotations)
    content = annotations if isinstance(annotations, dict) else read_instances(annotations)
    ids = category_ids_by_name(content["categories"], where)
    if split is not None:
        absent = [name for name in split.all if name not in ids]
        if absent:
            raise InputError(
                f"{where}: no category {absent[0]!r} ({len(absent)} of the split's names are missing)"
            )
        chosen = set(split.all)
        ids = {name: category for name, category in ids.items() if name in chosen}
    entries = read_results(results, {entry["id"] for entry in content["images"]}, where)
    counted = [entry for entry in entries if entry["category_id"] in set(ids.values())]

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = _truth(content, where)
        coco = COCOeval(truth, _detected(truth, counted), "bbox")
        coco.params.catIds = list(ids.values())
        coco.params.maxDets = [max_detections]
        coco.evaluate()
        coco.accumulate()
    precision: NDArray[np.float64] = coco.eval["precision"][..., -1]  # [T, R, K, A]
    # pycocotools sorts the category ids; `ids` is in that order already.
    metrics = _summary(precision, list(ids), split)
    return Evaluation(metrics, _per_class(precision, ids, split, truth, counted), len(entries) - len(counted))


def _summary(precision: NDArray[np.float64], names: list[str], split: Split | None) -> dict[str, float]:
    metrics = {
        "AP": _mean(precision[:, :, :, 0]),
        "AP50": _mean(precision[0, :, :, 0]),
        "AP75": _mean(precision[5, :, :, 0]),
        "APs": _mean(precision[:, :, :, AREAS.index("small")]),
        "APm": _mean(precision[:, :, :, AREAS.index("medium")]),
        "APl": _mean(precision[:, :, :, AREAS.index("large")]),
    }
    parts = {"all": list(range(len(names)))}
    if split is not None:
        novel = split.is_novel(names)
        parts["base"] = [k for k, is_novel in enumerate(novel) if not is_novel]
        parts["novel"] = [k for k, is_novel in enumerate(novel) if is_novel]
    for part, columns in parts.items():
        metrics[f"AP_{part}"] = _mean(precision[:, :, columns, 0])
        metrics[f"AP50_{part}"] = _mean(precision[0][:, columns, 0])
    return metrics


def _mean(precision: NDArray[np.float64]) -> float:
    """The mean over what was measured; pycocotools marks categories without true boxes by -1."""
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else NOTHING


def _per_class(
    precision: NDArray[np.float64],
    ids: dict[str, int],
    split: Split | None,
    truth: Any,
    results: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    boxes, detections = dict.fromkeys(ids.values(), 0), dict.fromkeys(ids.values(), 0)
    for annotation in truth.dataset["annotations"]:
        if annotation["category_id"] in boxes and not annotation["iscrowd"]:
            boxes[annotation["category_id"]] += 1
    for entry in results:
        detections[entry["category_id"]] += 1
    novel = [None] * len(ids) if split is None else split.is_novel(list(ids))
    return [
        {
            "name": name,
            "category_id": category,
            "novel": novel[k],
            "boxes": boxes[category],
            "detections": detections[category],
            "AP": _mean(precision[:, :, k, 0]),
            "AP50": _mean(precision[0, :, k, 0]),
        }
        for k, (name, category) in enumerate(ids.items())
    ]


def _index(dataset: dict[str, Any]) -> Any:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _truth(content: dict[str, Any], where: str) -> Any:
    """Builds pycocotools' index of the truth, with the fields that a user's file may lack."""
    annotations = []
    for place, entry in enumerate(content["annotations"]):
        try:
            box = [float(value) for value in entry["bbox"]]
            fields = {key: entry[key] for key in ("image_id", "category_id")}
        except (KeyError, TypeError, ValueError):
            box = []
        if len(box) != 4 or not all(map(math.isfinite, box)):
            raise InputError(
                f"{where}: annotations[{place}] needs image_id, category_id and a bbox of four numbers"
            )
        # pycocotools takes a detection matched to annotation 0 for unmatched, and mixes up ids that repeat:
        # count anew from 1.
        size = float(entry["area"]) if entry.get("area") is not None else box[2] * box[3]
        crowd = int(bool(entry.get("iscrowd")))
        annotations.append({"id": place + 1, "bbox": box, "area": size, "iscrowd": crowd, **fields})
    images = [{"id": entry["id"]} for entry in content["images"]]
    return _index({"images": images, "annotations": annotations, "categories": content["categories"]})


def _detected(truth: Any, results: list[dict[str, Any]]) -> Any:
    """Does what COCO.loadRes does for boxes, and does it for an empty list too."""
    annotations = [
        {**entry, "id": place, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
        for place, entry in enumerate(results, start=1)
    ]
    return _index({**truth.dataset, "annotations": annotations})


def proposal_recall(
    truth: Sequence[Tensor],
    proposals: Sequence[Tensor],
    novel: Sequence[Tensor] | None = None,
    limits: Sequence[int] = (10, 100, 300, 1000),
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> dict[str, float]:
    """How many true boxes the best proposals cover, each proposal covering at most one.

    Args:
        truth: each image's [G, 4] true boxes, crowds left out.
        proposals: each image's [P, 4] boxes, best first.
        novel: each image's [G] bool, whether a true box is of a novel category.
        limits: how many of the best proposals of an image count.
        thresholds: the IoUs over which average recall is the mean.

    Returns:
        For each limit k: recall@k at IoU 0.5 and AR@k, the mean recall over `thresholds`; with `novel` also
        recall@k_base, recall@k_novel, AR@k_base, AR@k_novel.
    """
    if len(truth) != len(proposals) or (novel is not None and len(novel) != len(truth)):
        raise ValueError(
            f"truth, proposals and novel must be of the same images, got {len(truth)}, {len(proposals)}"
        )
    overlaps = [
        iou(t.cpu().double(), p.cpu().double()).numpy() for t, p in zip(truth, proposals, strict=True)
    ]  # [G, P] each
    parts: dict[str, NDArray[np.bool_] | slice] = {"": slice(None)}
    if novel is not None:
        is_novel = np.concatenate(
            [np.zeros(0, dtype=bool), *(part.cpu().numpy().astype(bool) for part in novel)]
        )
        parts |= {"_base": ~is_novel, "_novel": is_novel}
    steps = np.asarray(thresholds, dtype=np.float64)
    metrics: dict[str, float] = {}
    for limit in limits:
        covered = np.concatenate([np.zeros(0), *(_best_covers(overlap[:, :limit]) for overlap in overlaps)])
        for suffix, which in parts.items():
            mine = covered[which]
            metrics[f"recall@{limit}{suffix}"] = float((mine >= 0.5).mean()) if mine.size else NOTHING
            average = (mine[:, None] >= steps).mean() if mine.size else NOTHING
            metrics[f"AR@{limit}{suffix}"] = float(average)
    return metrics


def _best_covers(overlap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns [G] each true box's IoU with a proposal of its own, the highest of [G, P] first; 0: none."""
    covers = np.zeros(overlap.shape[0])
    if not overlap.size:
        return covers
    overlap = overlap.copy()
    for _ in range(min(overlap.shape)):
        box, proposal = np.unravel_index(int(overlap.argmax()), overlap.shape)
        if overlap[box, proposal] <= 0:
            break
        covers[box] = overlap[box, proposal]
        overlap[box, :], overlap[:, proposal] = -1, -1
    return covers


def classification_accuracy(
    scores: Tensor, labels: Tensor, novel: Tensor | None = None, top: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """How often a box's true name is among the best scored ones, over all boxes (not a mean of classes).

    A name that ties with the true one counts as better, so that equal scores do not look like knowledge.

    Args:
        scores: [N, C], the higher the likelier; finite.
        labels: [N] int64, the true names.
        novel: [C] bool, which names are novel.
        top: how many of the best names may hold the true one.

    Returns:
        For each k of `top`: topk; with `novel` also topk_base and topk_novel.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"scores must be [N, C] and labels [N], got {list(scores.shape)}, {list(labels.shape)}"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("scores hold NaN or infinity")
    own = scores.gather(1, labels[:, None])  # [N, 1]
    rank = (scores >= own).sum(1)  # [N], 1 is the best: the true name itself is counted
    parts = {"": torch.ones_like(labels, dtype=torch.bool)}
    if novel is not None:
        is_novel = novel.bool()[labels]
        parts |= {"_base": ~is_novel, "_novel": is_novel}
    return {
        f"top{k}{suffix}": float((rank[which] <= k).float().mean()) if bool(which.any()) else NOTHING
        for k in top
        for suffix, which in parts.items()
    }
