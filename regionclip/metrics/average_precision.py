"""Average precision of detections and accuracy of classified boxes, for base and novel categories.

Every figure is a fraction in [0, 1], or -1 where there is nothing to measure (pycocotools' convention).
"""

# T IoU thresholds, R recall thresholds, K categories, A area ranges; G true boxes, P proposals, N boxes, C
# names
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_base.data.coco import area_of, box_of, check_instances, file_name_of, is_crowd, read_instances
from clip_base.runtime.errors import InputError
from regionclip.data.categories import Split
from regionclip.data.coco import category_ids_by_name, frequencies
from regionclip.data.results import read_results
from regionclip.metrics import lvis
from regionclip.metrics.coco_api import (
    EVALUATORS,
    Curves,
    Precision,
    require_faster_coco_eval,
    with_faster_coco_eval,
)

NOTHING = -1.0
AREAS = ("all", "small", "medium", "large")
IOU_THRESHOLDS = tuple(float(threshold) for threshold in np.linspace(0.5, 0.95, 10))  # COCO's ten


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_detections` found.

    Attributes:
        metrics: AP, AP50, AP75, APs, APm, APl, AP_all, AP50_all; average recall AR@1, AR@10, AR@100, and with
            100 by size ARs@100, ARm@100, ARl@100; with a split also AP_base, AP_novel, AP50_base, AP50_novel,
            AR@100_base, AR@100_novel. By LVIS's protocol also APr, APc, APf (rare, common, frequent), and
            recall with 300 detections only.
        per_class: for each category: name, category_id, novel (None without a split), boxes (true ones that
            count), detections, AP, AP50.
        ignored: results that do not count: of categories that are not evaluated or not annotated and, by
            LVIS's protocol, beyond an image's limit or of categories that were not checked there.
        counted: the other results; by LVIS's protocol with `forgiven`, see `regionclip.metrics.lvis.counted`.
        precision: [T, R, K, A], the categories in the order of `per_class`; -1: no true box.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    ignored: int
    counted: list[dict[str, Any]]
    precision: Precision


@dataclass(frozen=True)
class Protocol:
    """How detections are measured.

    Attributes:
        kind: "coco"; "lvis", the federated one; "auto", which takes "lvis" when the annotations say what was
            looked for in each image.
        evaluator: "pycocotools", or "fast" for faster-coco-eval. LVIS's protocol is our own where it is not
            "fast".
        max_detections: best scored detections that count: COCO's of an image and category, LVIS's of an
            image. 0: 100 and 300.
        label_set: "all": base and novel names, the "generalized" setting of arXiv 2112.09106, section 4.1;
            "base" or "novel": only those.
    """

    kind: str = "auto"
    evaluator: str = "pycocotools"
    max_detections: int = 0
    label_set: str = "all"


def evaluate_detections(
    annotations: str | Path | dict[str, Any],
    results: str | Path | Sequence[dict[str, Any]],
    split: Split | None = None,
    protocol: Protocol = Protocol(),
    content: dict[str, Any] | None = None,
) -> Evaluation:
    """Average precision of a results file in COCO's format, as pycocotools or LVIS's tools compute it.

    Base and novel figures are means over their categories of one evaluation in which all names compete.

    Args:
        annotations: a file in COCO's instances form, or its content.
        results: a results file (a list of image_id, category_id, bbox [x, y, width, height], score), or its
            content; see `read_results`.
        split: base and novel categories; None evaluates every category of the annotations.
        protocol: how to measure.
        content: what `read_instances` made of the annotations file, when it has been read already.

    Raises:
        InputError: a malformed file or entry, a result for an image that the annotations do not have, a
            split whose names are not in the annotations, or annotations that do not suit the protocol.
    """
    where = "annotations" if isinstance(annotations, dict) else str(annotations)
    if isinstance(annotations, dict):
        content = check_instances(annotations, where)
    elif content is None:
        content = read_instances(annotations)
    federated = check_protocol(content, where, split, protocol)
    ids = category_ids_by_name(content["categories"], where)
    names = {entry["id"]: _file_name(entry) for entry in content["images"]}
    read = read_results(results, names, where, ids)
    often = dict(zip(ids, frequencies(content["categories"]), strict=True))
    if split is not None:
        chosen = set(split.competing(protocol.label_set))
        ids = {name: category for name, category in ids.items() if name in chosen}
    evaluated = set(ids.values())
    counted = [entry for entry in read.entries if entry["category_id"] in evaluated]
    truth = _truth(content, where)
    most, numbers = protocol.max_detections, list(ids.values())
    if not federated:
        curves = EVALUATORS[protocol.evaluator](truth, counted, numbers, most or 100)
    else:
        counted = lvis.counted(truth, counted, most or lvis.MOST)
        if protocol.evaluator == "fast":
            curves = with_faster_coco_eval(truth, counted, numbers, most or lvis.MOST, federated=True)
        else:
            curves = lvis.with_numpy(truth, counted, numbers, most or lvis.MOST)
    # The evaluators sort the category ids; `ids` is in that order already.
    metrics = _summary(curves, list(ids), split, often if federated else {})
    rows = _per_class(curves.precision, ids, split, truth, counted)
    ignored = len(read.entries) + read.unknown - len(counted)
    return Evaluation(metrics, rows, ignored, counted, curves.precision)


def check_protocol(content: dict[str, Any], where: str, split: Split | None, protocol: Protocol) -> bool:
    """Returns whether annotations are evaluated by LVIS's protocol; to be called before anything is detected.

    Args:
        content: in COCO's instances form.
        where: names the annotations in messages.
        split: base and novel names; None: there is no such split.
        protocol: how to evaluate.

    Raises:
        InputError: the split's names are not in the annotations, these do not suit the protocol, or the
            evaluator is not installed.
    """
    ids = category_ids_by_name(content["categories"], where)
    absent = [name for name in split.all if name not in ids] if split else []
    if absent:
        raise InputError(
            f"{where}: no category {absent[0]!r} ({len(absent)} of the split's names are missing)"
        )
    if protocol.evaluator == "fast":
        require_faster_coco_eval()
    federated = protocol.kind == "lvis" or (protocol.kind == "auto" and lvis.is_federated(content))
    if federated:
        _check_federated(content, dict(zip(ids, frequencies(content["categories"]), strict=True)), where)
    return federated


def _file_name(entry: dict[str, Any]) -> str:
    """Returns an image's file name, "" where it has none: its number will do."""
    try:
        return file_name_of(entry, "")
    except InputError:
        return ""


def _summary(
    curves: Curves, names: list[str], split: Split | None, often: dict[str, str]
) -> dict[str, float]:
    precision, recall, most = curves.precision, curves.recall, curves.limits[-1]
    metrics = {
        "AP": mean_of(precision[:, :, :, 0]),
        "AP50": mean_of(precision[0, :, :, 0]),
        "AP75": mean_of(precision[5, :, :, 0]),
        "APs": mean_of(precision[:, :, :, AREAS.index("small")]),
        "APm": mean_of(precision[:, :, :, AREAS.index("medium")]),
        "APl": mean_of(precision[:, :, :, AREAS.index("large")]),
    }
    for letter in "rcf" if often else "":
        columns = [k for k, name in enumerate(names) if often[name] == letter]
        metrics[f"AP{letter}"] = mean_of(precision[:, :, columns, 0])
    parts = {"all": list(range(len(names)))}
    if split is not None:
        novel = split.is_novel(names)
        parts["base"] = [k for k, is_novel in enumerate(novel) if not is_novel]
        parts["novel"] = [k for k, is_novel in enumerate(novel) if is_novel]
    for part, columns in parts.items():
        metrics[f"AP_{part}"] = mean_of(precision[:, :, columns, 0])
        metrics[f"AP50_{part}"] = mean_of(precision[0][:, columns, 0])
    for place, limit in enumerate(curves.limits):
        metrics[f"AR@{limit}"] = mean_of(recall[:, :, 0, place])
    for area in ("small", "medium", "large"):
        metrics[f"AR{area[0]}@{most}"] = mean_of(recall[:, :, AREAS.index(area), -1])
    for part, columns in parts.items() if split is not None else ():
        if part != "all":
            metrics[f"AR@{most}_{part}"] = mean_of(recall[:, columns, 0, -1])
    return metrics


def _check_federated(content: dict[str, Any], often: dict[str, str], where: str) -> None:
    lacking = next(
        (
            (entry["id"], key)
            for entry in content["images"]
            for key in ("neg_category_ids", "not_exhaustive_category_ids")
            if not isinstance(entry.get(key), list)
        ),
        None,
    )
    if lacking is not None:
        raise InputError(
            f"{where}: image {lacking[0]} has no list {lacking[1]!r}, which LVIS's protocol needs; "
            "give LVIS's own annotations or protocol=coco"
        )
    unknown = [name for name, letter in often.items() if letter not in (*"rcf",)]
    if unknown:
        raise InputError(
            f"{where}: category {unknown[0]!r} has no `frequency` r, c or f ({len(unknown)} have none); "
            "LVIS's APr, APc and APf need it; give LVIS's own annotations or protocol=coco"
        )


def mean_of(precision: Precision) -> float:
    """The mean over what was measured; pycocotools marks categories without true boxes by -1."""
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else NOTHING


def _per_class(
    precision: Precision,
    ids: dict[str, int],
    split: Split | None,
    truth: dict[str, Any],
    results: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    boxes, detections = dict.fromkeys(ids.values(), 0), dict.fromkeys(ids.values(), 0)
    for annotation in truth["annotations"]:
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
            "AP": mean_of(precision[:, :, k, 0]),
            "AP50": mean_of(precision[0, :, k, 0]),
        }
        for k, (name, category) in enumerate(ids.items())
    ]


def _truth(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns annotations as evaluators need them, with the fields that a user's file may lack."""
    annotations = []
    shown = {entry["id"] for entry in content["images"]}
    for place, entry in enumerate(content["annotations"]):
        at = f"{where}: annotations[{place}]"
        box, fields = list(box_of(entry, at)), {key: entry[key] for key in ("image_id", "category_id")}
        # pycocotools takes a detection matched to annotation 0 for unmatched, and mixes up ids that repeat:
        # count from 1 again.
        area = area_of(entry, at)
        size = box[2] * box[3] if area is None else area
        crowd = int(is_crowd(entry, at))
        if fields["image_id"] in shown:
            annotations.append({"id": place + 1, "bbox": box, "area": size, "iscrowd": crowd, **fields})
    kept = ("id", "neg_category_ids", "not_exhaustive_category_ids")
    images = [{key: entry[key] for key in kept if key in entry} for entry in content["images"]]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}


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
