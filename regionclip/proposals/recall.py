"""Recall of proposals over a stream of images; what memory holds does not grow with their number."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import Tensor

from regionclip.evaluation import NOTHING, proposal_recall

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
