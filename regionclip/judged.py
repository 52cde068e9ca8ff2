"""Mined regions with the truth's verdicts: precision and recall by threshold, by category and by bin."""

# P regions
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regionclip.datasets import CocoDetection
from regionclip.evaluation import NOTHING
from regionclip.pairs import (
    NO_OBJECT,
    RIGHT,
    UNKNOWN,
    VERDICTS,
    WRONG_NAME,
    Judgement,
    Pair,
    canonical_name,
    judge,
)
from regionclip.shards import MinedRegion
from regionclip.splits import Split

SHOWN = (RIGHT, WRONG_NAME, NO_OBJECT)


@dataclass(frozen=True)
class JudgedRegions:
    """Mined regions and what the truth says of them.

    Attributes:
        regions: as mined.
        judgement: of each region with its first concept.
        split: which categories are base and novel; None: no difference is made.
    """

    regions: Sequence[MinedRegion]
    judgement: Judgement
    split: Split | None

    @cached_property
    def probabilities(self) -> Tensor:
        """[P], of the first concept."""
        return torch.tensor([region.concept_probs[0] for region in self.regions], dtype=torch.float64)

    @cached_property
    def objectness(self) -> Tensor:
        """[P]."""
        return torch.tensor([region.objectness for region in self.regions], dtype=torch.float64)

    @cached_property
    def words(self) -> list[str]:
        """Each region's verdict as a word."""
        return self.judgement.words()

    def metrics(self, kept: Tensor | None = None) -> dict[str, float]:
        """Returns `Judgement.metrics` of the regions that `kept` [P] bool picks, for the split's parts."""
        base, novel = (self.split.base, self.split.novel) if self.split else ((), ())
        return self.judgement.metrics(base, novel, kept)

    def by_threshold(self, values: Tensor, thresholds: Sequence[float]) -> list[dict[str, float]]:
        """Returns, for each threshold, itself and the metrics of the regions whose value [P] reaches it."""
        return [{"threshold": level, **self.metrics(values >= level)} for level in thresholds]

    def by_bin(self, values: Tensor, bins: int = 10) -> tuple[list[str], dict[str, list[float]], list[int]]:
        """Cuts [0, 1] into equal bins of the values [P].

        Returns:
            Each bin's lower edge; correct, misclassified, background -> its share in each bin; the number
            of regions in each bin. Regions that cannot be judged are left out.
        """
        places = (values * bins).long().clamp(0, bins - 1)
        verdicts = self.judgement.verdicts
        counts = {
            VERDICTS[number]: torch.bincount(places[verdicts == number], minlength=bins) for number in SHOWN
        }
        totals: Tensor = torch.stack(list(counts.values())).sum(0)
        shares = {name: (count / totals.clamp(min=1)).tolist() for name, count in counts.items()}
        return [f"{place / bins:.1f}" for place in range(bins)], shares, totals.tolist()

    def by_category(self) -> list[dict[str, Any]]:
        """Returns a row for each category of the split, or of the truth: novel ones first, then by name.

        Each holds name, part ("base", "novel" or ""), objects, pairs (judged ones), precision, wrong_name,
        no_object, recall.
        """
        counts, objects, found = (table.tolist() for table in self.judgement.by_category())
        rows = []
        for label, name in enumerate(self.judgement.categories):
            if self.split is not None and name not in self.split.all:
                continue
            judged = sum(counts[label]) - counts[label][UNKNOWN]
            row: dict[str, Any] = {"name": name, "part": self.part_of(name), "objects": objects[label]}
            row["pairs"] = judged
            for key, verdict in (("precision", RIGHT), ("wrong_name", WRONG_NAME), ("no_object", NO_OBJECT)):
                row[key] = counts[label][verdict] / judged if judged else NOTHING
            row["recall"] = found[label] / objects[label] if objects[label] else NOTHING
            rows.append(row)
        return sorted(rows, key=lambda row: (row["part"] != "novel", row["name"]))

    def part_of(self, name: str) -> str:
        """Returns "base", "novel", or "" for a category outside the split."""
        if self.split is None:
            return ""
        return "novel" if name in self.split.novel else "base" if name in self.split.base else ""

    def least_mistaken(self, rows: Sequence[Mapping[str, float]]) -> float | None:
        """Returns the threshold of the row whose precision and recall balance best (F1); None: nothing right.

        Args:
            rows: from `by_threshold`.
        """
        best = max(rows, key=_f1, default=None)
        return best["threshold"] if best is not None and _f1(best) > 0 else None

    @property
    def can_be_judged(self) -> bool:
        """Whether the truth says anything of any region."""
        return bool((self.judgement.verdicts != UNKNOWN).any())


def _f1(row: Mapping[str, float]) -> float:
    precision, recall = row["precision"], row["recall"]
    if NOTHING in (precision, recall) or precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def judge_regions(
    regions: Sequence[MinedRegion],
    truth: CocoDetection,
    split: Split | None,
    images: Collection[int] | None = None,
) -> JudgedRegions:
    """Judges mined regions by their first concept, which names a category as `canonical_name` says.

    Args:
        regions: as mined.
        truth: annotations of all categories: an object outside the split is an object too.
        split: base and novel categories.
        images: the ids of the images that were mined; None: all that the truth lists.
    """
    pairs = [Pair(region.image_id, region.box, region.concept) for region in regions]
    names = {name: canonical_name(name, truth.categories) for name in {pair.name for pair in pairs}}
    return JudgedRegions(regions, judge(pairs, truth, names.get, images=images), split)
