"""Precision and recall by the COCO protocol: pycocotools, the reference, and faster-coco-eval."""

# T IoU thresholds, R recall thresholds, K categories, A area ranges, M limits on detections
from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from clip_base.runtime.errors import InputError

# [T, R, K, A] in [0, 1]; -1 for a category that has no true box in that range of areas.
Precision = NDArray[np.float64]
# [T, K, A, M] in [0, 1]; -1 likewise.
Recall = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """What an evaluator measures.

    Attributes:
        precision: [T, R, K, A], with as many detections as the last of `limits`.
        recall: [T, K, A, M], with the best detections up to each limit.
        limits: M numbers of best scored detections that count, rising; COCO's of an image and category,
            LVIS's of an image.
    """

    precision: Precision
    recall: Recall
    limits: tuple[int, ...]


def limits_of(most: int) -> list[int]:
    """Returns the numbers of detections that COCO measures recall with, `most` in place of its 100."""
    return [*(limit for limit in (1, 10) if limit < most), most]


def with_pycocotools(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], category_ids: Sequence[int], most: int
) -> Curves:
    """Computes precision and recall by pycocotools.

    Args:
        truth: instances whose annotations are numbered from 1 and have an area and `iscrowd`.
        results: detections with image_id, category_id, bbox and score.
        category_ids: K categories to evaluate, rising.
        most: best scored detections of an image and category that count.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        index = _indexed(COCO(), truth)
        detected = _indexed(COCO(), {**truth, "annotations": numbered(results)})
        evaluation = COCOeval(index, detected, "bbox")
        evaluation.params.catIds = list(category_ids)
        evaluation.params.maxDets = limits_of(most)
        evaluation.evaluate()
        evaluation.accumulate()
    return _curves(evaluation)


def with_faster_coco_eval(
    truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    category_ids: Sequence[int],
    most: int,
    federated: bool = False,
) -> Curves:
    """Computes the same by faster-coco-eval: COCO's protocol faster, LVIS's slower than ours.

    Args:
        truth: see `with_pycocotools`.
        results: see there.
        category_ids: see there.
        most: see there.
        federated: whether the images' neg_category_ids and not_exhaustive_category_ids count, as in LVIS.

    Raises:
        InputError: faster-coco-eval is not installed.
    """
    fast = require_faster_coco_eval()
    index = _indexed(fast.COCO(), truth)
    detected = _indexed(fast.COCO(), {**truth, "annotations": numbered(results)})
    evaluation = fast.COCOeval_faster(
        index, detected, "bbox", print_function=_nothing, extra_calc=False, lvis_style=federated
    )
    evaluation.params.catIds = list(category_ids)
    evaluation.params.maxDets = [most] if federated else limits_of(most)
    evaluation.evaluate()
    evaluation.accumulate()
    return _curves(evaluation)


def require_faster_coco_eval() -> Any:
    """Returns the module; an InputError when it is not installed."""
    try:
        import faster_coco_eval as fast  # noqa: PLC0415 (optional)
    except ImportError:
        raise InputError(
            "evaluator=fast needs faster-coco-eval: pip install 'regionclip[fast]'; "
            "evaluator=pycocotools gives the same figures"
        ) from None
    return fast


def _curves(evaluation: Any) -> Curves:
    precision = np.asarray(evaluation.eval["precision"], dtype=np.float64)[..., -1]
    recall = np.asarray(evaluation.eval["recall"], dtype=np.float64)
    return Curves(precision, recall, tuple(evaluation.params.maxDets))


EVALUATORS: dict[str, Callable[..., Curves]] = {
    "pycocotools": with_pycocotools,
    "fast": with_faster_coco_eval,
}


def numbered(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns detections as annotations: what COCO.loadRes does, for an empty list too.

    The size of a detection is its mask's area where it was written without a box, else its box's.
    """
    return [
        {"area": entry["bbox"][2] * entry["bbox"][3], **entry, "id": place, "iscrowd": 0}
        for place, entry in enumerate(results, start=1)
    ]


def _indexed(coco: Any, dataset: dict[str, Any]) -> Any:
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _nothing(*_: object) -> None:
    """Prints nothing."""
