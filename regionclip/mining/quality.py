"""Quality of mined region-phrase pairs: precision and recall against ground truth."""

# P pairs, G true boxes; p and g those of one image
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import Split
from regionclip.data.file_names import FileNames, ids_by_name
from regionclip.metrics.average_precision import NOTHING
from regionclip.metrics.matching import BACKGROUND, CORRECT, IGNORED, MISCLASSIFIED, OUTCOMES, match_image
from regionclip.mining.shards import MinedRegion

Box = tuple[float, float, float, float]
SHOWN = (CORRECT, MISCLASSIFIED, BACKGROUND)


@dataclass(frozen=True)
class Pair:
    """A mined region and the phrase that was given to it.

    Attributes:
        image_id: as in the annotations; None: they do not have the image.
        box: (x1, y1, x2, y2) in pixels of the original image.
        name: the phrase.
    """

    image_id: int | None
    box: Box
    name: str


@dataclass(frozen=True)
class PairLabels:
    """What the truth says of mined pairs.

    Attributes:
        categories: the truth's names; labels count them.
        outcomes: [P] int64, places in OUTCOMES. "correct": the box shows an object of that name;
            "misclassified": it shows an object, but none of that name; "background"; "ignored": the
            annotations have no such image or category, or the box is in a crowd of that name.
        named: [P] int64, the label that the pair's phrase names, -1 when it names none.
        shown: [P] int64, the label of the true object that the box fits best, -1 when it fits none.
        objects: [G] int64, the labels of all true single objects.
        cover: [E, 2] int64, each right pair with each true object of its name that it covers.
    """

    categories: tuple[str, ...]
    outcomes: Tensor
    named: Tensor
    shown: Tensor
    objects: Tensor
    cover: Tensor

    def words(self) -> list[str]:
        """Returns each pair's outcome as a word."""
        return [OUTCOMES[outcome] for outcome in self.outcomes.tolist()]

    def metrics(
        self, base: Collection[str] = (), novel: Collection[str] = (), kept: Tensor | None = None
    ) -> dict[str, float]:
        """How true the pairs are, and how many of the true objects they name.

        Args:
            base: names of the base categories.
            novel: names of the novel ones.
            kept: [P] bool, the pairs that count; None: all.

        Returns:
            pairs and evaluated (numbers); of the evaluated ones the shares precision, misclassified and
            background; recall, the share of true objects that a right pair covers. With `base` or `novel` all
            but pairs again with _base and _novel: by the pair's name, and for recall by the true object's.
            A share of nothing is NOTHING.
        """
        kept = torch.ones(len(self.outcomes), dtype=torch.bool) if kept is None else kept
        found = self._found(kept)
        parts = {"": self.categories}
        parts |= {"_base": tuple(base), "_novel": tuple(novel)} if base or novel else {}
        metrics: dict[str, float] = {"pairs": int(kept.sum())}
        for suffix, names in parts.items():
            wanted = torch.tensor([name in set(names) for name in self.categories], dtype=torch.bool)
            counted = kept & (self.outcomes != IGNORED) & wanted[self.named]  # unknown where named is -1
            outcomes = self.outcomes[counted]
            metrics["evaluated" + suffix] = len(outcomes)
            for key, outcome in (
                ("precision", CORRECT),
                ("misclassified", MISCLASSIFIED),
                ("background", BACKGROUND),
            ):
                metrics[key + suffix] = _share(outcomes == outcome)
            metrics["recall" + suffix] = _share(found[wanted[self.objects]])
        return metrics

    def by_category(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns per category: [C, 5] pairs by outcome, [C] true objects, [C] those that are named."""
        classes, outcomes = len(self.categories), len(OUTCOMES)
        naming = self.named >= 0
        cells = (self.named * outcomes + self.outcomes)[naming]
        counts = torch.bincount(cells, minlength=classes * outcomes).view(classes, outcomes)
        found = self._found(torch.ones_like(naming))
        return (
            counts,
            torch.bincount(self.objects, minlength=classes),
            torch.bincount(self.objects[found], minlength=classes),
        )

    def _found(self, kept: Tensor) -> Tensor:
        """Returns [G] bool, the true objects that a right one of the kept pairs [P] covers."""
        found = torch.zeros(len(self.objects), dtype=torch.bool)
        found[self.cover[kept[self.cover[:, 0]], 1]] = True
        return found

    def confusions(self) -> list[tuple[str, str, int]]:
        """Returns (name that was given, name of the object shown, how often), the most frequent first."""
        wrong = self.outcomes == MISCLASSIFIED
        counts = Counter(zip(self.named[wrong].tolist(), self.shown[wrong].tolist(), strict=True))
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [(self.categories[a], self.categories[b], count) for (a, b), count in ordered]


def _share(which: Tensor) -> float:
    return float(which.double().mean()) if len(which) else NOTHING


def label_pairs(
    pairs: Sequence[Pair],
    truth: CocoDetection,
    canonical: Callable[[str], str | None] | None = None,
    threshold: float = 0.5,
    images: Collection[int] | None = None,
) -> PairLabels:
    """Says of each mined pair whether it is true.

    Args:
        pairs: mined pairs.
        truth: the images' annotations, crowds included.
        canonical: turns a phrase into a category's name, or None when it names no category; without one a
            phrase must equal the name, whatever its case.
        threshold: the IoU from which on a box is taken to show an object.
        images: the ids of the images that were mined; other images' objects do not count. None: all of them.
    """
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(truth.categories)}
    name_of = canonical or _same_name(truth.categories)
    labels = {name: label_of.get(name_of(name), -1) for name in {pair.name for pair in pairs}}
    named = torch.tensor([labels[pair.name] for pair in pairs], dtype=torch.int64)  # [P]
    boxes = torch.tensor([pair.box for pair in pairs], dtype=torch.float32).reshape(-1, 4)  # [P, 4]
    outcomes, shown = torch.full_like(named, IGNORED), torch.full_like(named, -1)
    of_image: dict[int | None, list[int]] = {}
    for place, pair in enumerate(pairs):
        of_image.setdefault(pair.image_id, []).append(place)
    cover, objects = [named.new_zeros(0, 2)], [named.new_zeros(0)]
    count = 0
    for record in truth:
        if images is not None and record.image_id not in images:
            continue
        if record.image_id in of_image:
            rows = torch.tensor(of_image[record.image_id])
            found, objects_shown, edges = match_image(
                boxes[rows], named[rows].numpy(), record, threshold, once=False
            )
            single = record.without_crowds()
            outcomes[rows] = torch.from_numpy(found)
            fitting = torch.from_numpy(objects_shown >= 0)
            shown[rows[fitting]] = single.labels[torch.from_numpy(objects_shown)[fitting]]
            pairs_of = torch.from_numpy(edges)
            cover.append(torch.stack([rows[pairs_of[:, 0]], pairs_of[:, 1] + count], 1))
        labels_of_image = record.labels[~record.iscrowd]
        objects.append(labels_of_image)
        count += len(labels_of_image)
    return PairLabels(truth.categories, outcomes, named, shown, torch.cat(objects), torch.cat(cover))


def canonical_name(phrase: str, categories: Collection[str]) -> str | None:
    """Returns the category that a phrase names as a whole or else by its last words.

    Case does not matter, nor whether a category is written with underscores, as LVIS writes its names.
    """
    names = {name.casefold().replace("_", " "): name for name in categories}
    words = phrase.casefold().split()
    endings = (" ".join(words[start:]) for start in range(len(words)))
    return next((names[ending] for ending in endings if ending in names), None)


def _same_name(categories: Sequence[str]) -> Callable[[str], str | None]:
    names = {name.casefold(): name for name in categories}
    return lambda phrase: names.get(phrase.strip().casefold())


@dataclass(frozen=True)
class PairQuality:
    """Mined regions and what the truth says of them.

    Attributes:
        regions: as mined.
        labels: of each region with its first concept.
        split: which categories are base and novel; None: no difference is made.
    """

    regions: Sequence[MinedRegion]
    labels: PairLabels
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
        """Each region's outcome as a word."""
        return self.labels.words()

    def metrics(self, kept: Tensor | None = None) -> dict[str, float]:
        """Returns `PairLabels.metrics` of the regions that `kept` [P] bool picks, for the split's parts."""
        base, novel = (self.split.base, self.split.novel) if self.split else ((), ())
        return self.labels.metrics(base, novel, kept)

    def by_threshold(self, values: Tensor, thresholds: Sequence[float]) -> list[dict[str, float]]:
        """Returns, for each threshold, itself and the metrics of the regions whose value [P] reaches it."""
        return [{"threshold": level, **self.metrics(values >= level)} for level in thresholds]

    def by_bin(self, values: Tensor, bins: int = 10) -> tuple[list[str], dict[str, list[float]], list[int]]:
        """Cuts [0, 1] into equal bins of the values [P].

        Returns:
            Each bin's lower edge; correct, misclassified, background -> its share in each bin; the number
            of regions in each bin. Ignored regions are left out.
        """
        places = (values * bins).long().clamp(0, bins - 1)
        outcomes = self.labels.outcomes
        counts = {
            OUTCOMES[number]: torch.bincount(places[outcomes == number], minlength=bins) for number in SHOWN
        }
        totals: Tensor = torch.stack(list(counts.values())).sum(0)
        shares = {name: (count / totals.clamp(min=1)).tolist() for name, count in counts.items()}
        return [f"{place / bins:.1f}" for place in range(bins)], shares, totals.tolist()

    def by_category(self) -> list[dict[str, Any]]:
        """Returns a row for each category of the split, or of the truth: novel ones first, then by name.

        Each holds name, part ("base", "novel" or ""), objects, pairs (evaluated ones), precision,
        misclassified, background, recall.
        """
        counts, objects, found = (table.tolist() for table in self.labels.by_category())
        rows = []
        for label, name in enumerate(self.labels.categories):
            if self.split is not None and name not in self.split.all:
                continue
            evaluated = sum(counts[label]) - counts[label][IGNORED]
            row: dict[str, Any] = {"name": name, "part": self.part_of(name), "objects": objects[label]}
            row["pairs"] = evaluated
            for key, outcome in (
                ("precision", CORRECT),
                ("misclassified", MISCLASSIFIED),
                ("background", BACKGROUND),
            ):
                row[key] = counts[label][outcome] / evaluated if evaluated else NOTHING
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
    def has_ground_truth(self) -> bool:
        """Whether the truth says anything of any region."""
        return bool((self.labels.outcomes != IGNORED).any())


def _f1(row: Mapping[str, float]) -> float:
    precision, recall = row["precision"], row["recall"]
    if NOTHING in (precision, recall) or precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def _known(images: Collection[str], there: Mapping[int, str]) -> set[int]:
    """Returns the ids of the images that the truth has."""
    known = FileNames(there, "the annotations")
    return {image_id for name in images if (image_id := known.find(name)) is not None}


def measure_pairs(
    regions: Sequence[MinedRegion],
    truth: CocoDetection,
    split: Split | None,
    images: Collection[str] | None = None,
) -> PairQuality:
    """Evaluates mined regions by their first concept, which names a category as `canonical_name` says.

    Regions find their images by file name: the annotations may number them otherwise than the captions.

    Args:
        regions: as mined.
        truth: annotations of all categories: an object outside the split is an object too.
        split: base and novel categories.
        images: file names of the images that were mined; None: all that the truth lists.

    Raises:
        InputError: the truth has none of the images, or has several of one name.
    """
    own = {region.image_id: region.file_name for region in regions}
    there = {record.image_id: str(record.path) for record in truth}
    ids = ids_by_name(own, there, "the mined regions", "the annotations")
    pairs = [Pair(ids.get(region.image_id), region.box, region.concept) for region in regions]
    mined = None if images is None else _known(images, there) | set(ids.values())
    names = {name: canonical_name(name, truth.categories) for name in {pair.name for pair in pairs}}
    return PairQuality(regions, label_pairs(pairs, truth, names.get, images=mined), split)
