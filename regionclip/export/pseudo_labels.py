"""The job `export`: mined regions as training data for other detectors.

regionclip export mined=runs/mined out=pseudo/instances.json classes=[coco65] min_probability=0.5
"""

# N candidate boxes of an image
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.runtime.errors import InputError, JobError
from clip_base.runtime.progress import Progress
from clip_base.storage.hashing import content_hash
from clip_base.storage.lock import lock_file
from regionclip.concepts.synonyms import aliases_of, given_classes
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.mining.columns import Floats, Ints, RegionColumns
from regionclip.mining.shards import MANIFEST, read_manifest, read_region_batches
from regionclip.structures.boxes import nms
from regionclip.structures.labels import LabeledImage, LabelTarget, write_labels


@everyday(
    "export mined=mined images=images format=yolo out=labels",
    input="mined images classes",
    output="out format keep_empty",
    quality="min_probability min_objectness nms",
)
@dataclass
class ExportConfig:
    """Options of exporting."""

    mined: str = option(REQUIRED, "folder of mined pairs from `regionclip mine`")
    out: str = option(REQUIRED, "format=coco, csv: file to write; other formats: folder", runtime_only=True)
    format: str = option(
        "coco",
        "coco: one file of annotations; yolo: labels/*.txt and data.yaml; voc: Annotations/*.xml; csv: a "
        "table; fiftyone: labels.json and data/; "
        "or another label writer that is installed",
    )
    images: str = option(
        "", "folder of the images that were mined; yolo, voc and fiftyone put a link to it beside the labels"
    )
    classes: list[str] = option(
        [], "class lists whose classes are the categories (coco, coco65, files …); empty: the mined concepts"
    )
    min_probability: float = option(0.0, "labels with a lower probability are left out, 0…1")
    min_objectness: float = option(0.0, "regions with lower objectness are left out, 0…1")
    labels: int = option(1, "maximum number of labels per region, the most probable concepts")
    nms: float = option(
        0.5, "IoU above which the lower scored of two boxes of a category is dropped; 1: none"
    )
    keep_empty: bool = option(False, "keep images without any boxes left; a detector treats them as empty")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name in ("min_probability", "min_objectness", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in 0…1, got {getattr(self, name)}")
        if self.labels < 1:
            raise InputError(f"labels must be at least 1 per region, got {self.labels}")


class Categories:
    """Which category a mined concept is: its own, or the class of a list that it or a synonym names.

    Args:
        config: names the class lists, if any.
        concepts: names of the vocabulary's rows.
    """

    def __init__(self, config: ExportConfig, concepts: tuple[str, ...]) -> None:
        if not config.classes:
            self.names, self.of_concept = list(concepts), list[int | None](range(len(concepts)))
            return
        classes = given_classes(config.classes)
        self.names = [entry[0] for entry in classes]
        labels, aliases = {name: label for label, name in enumerate(self.names)}, aliases_of(classes)
        self.of_concept = [labels.get(aliases.get(name, name)) for name in concepts]
        if all(label is None for label in self.of_concept):
            raise InputError(
                f"none of the {len(concepts)} mined concepts is a class of {', '.join(config.classes)}; "
                "mine with a pool that contains them (`regionclip concepts classes=…`)"
            )


def export(config: ExportConfig) -> None:
    """Writes mined regions as COCO annotations, YOLO labels or a FiftyOne folder, for training or viewing."""
    manifest = read_manifest(config.mined, "images", "skipped")
    options = {key: value for key, value in asdict(config).items() if key != "out"}
    made = {
        "description": "region-phrase pairs mined by regionclip; no box was drawn by hand",
        "manifest_sha256": content_hash(Path(config.mined) / MANIFEST),
        "options": options,
    }
    concepts = Vocabulary.load(Path(config.mined) / "vocabulary.safetensors").names
    categories = Categories(config, concepts)
    target = LabelTarget(Path(config.out), categories.names, config.images, made)
    counts, images = Counter[int](), 0

    def counted() -> Iterator[LabeledImage]:
        nonlocal images
        with Progress("exporting", manifest["images"] - manifest["skipped"]) as progress:
            for image in labeled(config, categories.of_concept):
                yield image
                counts.update(image.labels)
                images += 1
                progress.advance()
        if not counts:
            raise JobError(
                f"no box of {config.mined} passes min_probability={config.min_probability:g} and "
                f"min_objectness={config.min_objectness:g}; lower them"
            )

    with lock_file(config.out):
        written = write_labels(config.format, target, counted())
    if not written:
        print(f"{config.out} already exists and was made with the same options")
        return
    often = ", ".join(f"{categories.names[label]} {count:,}" for label, count in counts.most_common(5))
    print(
        f"{config.out}: {counts.total():,} boxes of {len(counts):,} of {len(categories.names):,} categories "
        f"in {images:,} images; most frequent: {often}"
    )


Candidate = tuple[list[float], int, float]


def labeled(config: ExportConfig, of_concept: list[int | None]) -> Iterator[LabeledImage]:
    """Yields the mined images with the labels that pass the thresholds."""
    labels = np.array([-1 if label is None else label for label in of_concept], np.int64)
    for _, group in groupby(_images(config, labels), key=lambda image: image.image_id):
        parts = list(group)  # several where a batch ends within an image
        chosen = _without_doubles([one for part in parts for one in part.candidates], config.nms)
        if chosen or config.keep_empty:
            boxes, kept, scores = (
                (list(column) for column in zip(*chosen, strict=True)) if chosen else ([],) * 3
            )
            first = parts[0]
            yield LabeledImage(
                first.image_id, first.file_name, first.height, first.width, boxes, kept, scores
            )


@dataclass(frozen=True)
class _ImagePart:
    """An image's regions in one batch: what they may be labeled as."""

    image_id: int
    file_name: str
    height: int
    width: int
    candidates: list[Candidate]


def _images(config: ExportConfig, label_of: Ints) -> Iterator[_ImagePart]:
    for batch in read_region_batches(config.mined):
        columns = RegionColumns(batch)
        ids = columns.image_ids
        starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
        rows, labels, probs = _candidates(columns, config, label_of)
        scores = probs * columns.objectness[rows]
        candidates = list(zip(columns.boxes[rows].tolist(), labels.tolist(), scores.tolist(), strict=True))
        ends = np.searchsorted(rows, np.append(starts[1:], len(columns))).tolist()
        first = 0
        names = ("image_id", "file_name", "height", "width")
        for image, end in zip(batch.select(names).take(pa.array(starts)).to_pylist(), ends, strict=True):
            yield _ImagePart(**image, candidates=candidates[first:end])
            first = end


def _candidates(columns: RegionColumns, config: ExportConfig, label_of: Ints) -> tuple[Ints, Ints, Floats]:
    """Returns the [N] rows, labels and probabilities of the labels that pass, region by region."""
    counts = columns.counts
    rows = np.repeat(np.arange(len(columns)), counts)
    ranks = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    labels, probs = label_of[columns.concept_ids], columns.concept_probs
    # A probability of 0 fills up rows; it says nothing.
    passes = (ranks < config.labels) & (labels >= 0) & (probs != 0) & (probs >= config.min_probability)
    passes &= columns.objectness[rows] >= config.min_objectness
    rows, labels, probs = rows[passes], labels[passes], probs[passes]
    # Several concepts may be names of one class: it has the place of the first and the highest probability.
    _, firsts, groups = np.unique(
        rows * (len(label_of) + labels.max(initial=0) + 1) + labels, return_index=True, return_inverse=True
    )
    best = np.zeros(len(firsts))
    np.maximum.at(best, groups, probs)
    order = np.argsort(firsts)
    return rows[firsts[order]], labels[firsts[order]], best[order]


def _without_doubles(candidates: list[Candidate], threshold: float) -> list[Candidate]:
    if threshold >= 1 or len(candidates) < 2:
        return candidates
    boxes, labels, scores = (torch.tensor(column) for column in zip(*candidates, strict=True))
    return [candidates[row] for row in sorted(nms(boxes, scores, labels, threshold).tolist())]
