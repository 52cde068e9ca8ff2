"""Recall of proposals over a stream of images, in constant memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regionclip.metrics.average_precision import IOU_THRESHOLDS, NOTHING
from regionclip.structures.boxes import iou

PARTS = ("_base", "_novel")


class RecallMeter:
    """Sums up `proposal_recall` image by image.

    Args:
        apart: whether base and novel categories are measured apart too.
    """

    def __init__(self, apart: bool) -> None:
        self.apart = apart
        self._boxes: Counter[str] = Counter()  # true boxes in all, of base ("_base") and of novel categories
        self._covered: dict[str, float] = {}

    def add(self, truth: Tensor, proposals: Tensor, novel: Tensor) -> None:
        """Counts one image.

        Args:
            truth: [G, 4] true boxes.
            proposals: [P, 4], best first.
            novel: [G] bool, whether a true box is of a novel category.
        """
        counts = {"": len(truth)}
        if self.apart:
            counts |= {"_base": int((~novel).sum()), "_novel": int(novel.sum())}
        self._boxes.update(counts)
        for key, share in proposal_recall([truth], [proposals], [novel] if self.apart else None).items():
            count = counts[_part(key)]
            self._covered[key] = self._covered.get(key, 0.0) + (share * count if count else 0.0)

    def metrics(self) -> dict[str, float]:
        """Returns what `proposal_recall` returns of all images at once."""
        empty = proposal_recall([torch.zeros(0, 4)], [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.bool)])
        names = self._covered or {key: 0.0 for key in empty if self.apart or not _part(key)}
        return {
            key: self._covered[key] / self._boxes[_part(key)] if self._boxes[_part(key)] else NOTHING
            for key in names
        }


def described(metrics: dict[str, float]) -> str:
    """Returns a line for each number of best proposals: recall at IoU 0.5, and its mean over IoU 0.5…0.95."""
    limits = [key.removeprefix("recall@") for key in metrics if re.fullmatch(r"recall@\d+", key)]
    parts = [part for part in ("", *PARTS) if f"recall@{limits[0]}{part}" in metrics]
    return "\n".join(
        f"recall of the best {limit}: "
        + ", ".join(
            f"{part.removeprefix('_') or 'all'} {metrics[f'recall@{limit}{part}']:.3f} "
            f"(AR {metrics[f'AR@{limit}{part}']:.3f})"
            for part in parts
        )
        for limit in limits
    )


def _part(key: str) -> str:
    return next((part for part in PARTS if key.endswith(part)), "")


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
        For each limit k: recall@k at IoU 0.5; AR@k, the mean recall over `thresholds`; and recall50@k,
        recall55@k, …, the recall at each. With `novel` all of them again for base and for novel categories:
        recall@k_base, recall@k_novel, ….
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
            at_least = (mine[:, None] >= steps).mean(0) if mine.size else np.full(len(steps), NOTHING)
            metrics[f"AR@{limit}{suffix}"] = float(at_least.mean())
            for step, share in zip(steps, at_least, strict=True):
                metrics[f"recall{round(100 * step)}@{limit}{suffix}"] = float(share)
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
