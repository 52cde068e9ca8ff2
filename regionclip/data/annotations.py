"""Images with boxes, from COCO instance annotations: validated, counted and stored as flat tensors.

What is wrong with single entries (a box of no area, one outside its image, one of an unknown category, an
annotation that stands twice, an image that is listed twice, an image that is missing) is left out and
counted in `problems`; what makes the file unusable is an `InputError` that names the entry.
"""

# N boxes in all, I images
from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_base.data.coco import read_instances
from clip_base.images.roots import IMAGES_HELP, ImageRoot
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError
from regionclip.data.coco import (
    annotation_columns,
    category_ids_by_name,
    frequencies,
    image_fields,
    repeated_annotations,
)
from regionclip.structures.boxes import clip_boxes, xywh_to_xyxy

# Annotation tools round: a box that reaches over the edge by less than this many pixels is no problem to
# report.
ROUNDING = 1.0


@dataclass(frozen=True)
class ImageAnnotations:
    """One image and its boxes.

    Attributes:
        image_id: its id in the annotations.
        path: the image's file.
        height: pixels.
        width: pixels.
        boxes: [n, 4] float32 (x1, y1, x2, y2) in pixels of the image, within it.
        labels: [n] int64 into the dataset's `categories`.
        iscrowd: [n] bool; a crowd box surrounds many objects of its category. Evaluation ignores what is in
            one; training must not take it for an object.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: Tensor
    labels: Tensor
    iscrowd: Tensor

    def without_crowds(self) -> ImageAnnotations:
        """Returns the record with the boxes of single objects only: what training sees."""
        return self._pick(~self.iscrowd)

    def _pick(self, which: Tensor) -> ImageAnnotations:
        return dataclasses.replace(
            self, boxes=self.boxes[which], labels=self.labels[which], iscrowd=self.iscrowd[which]
        )


@dataclass(kw_only=True)
class AnnotatedImages:
    """Which images with boxes a job reads."""

    annotations: str = option(REQUIRED, "instances_*.json in COCO's format")
    images: str = option(REQUIRED, IMAGES_HELP)


class CocoDetection(Sequence[ImageAnnotations]):
    """Records of a file in COCO's instances form, in the file's order of images.

    Args:
        annotations: the JSON file.
        images: the folder, or the tars, that its file names are relative to. None: images are not needed,
            paths are bare names.
        categories: which categories to keep, in the order that labels count them; None keeps all, in order of
            id.
        keep_empty: whether to keep images in which no single object (crowds do not count) is left.
        content: what `read_instances` made of the file, when it has been read already.

    Attributes:
        categories: names, by label.
        category_ids: the file's category ids, by label.
        frequencies: LVIS's "f", "c" or "r", by label; "" where the file does not say.
        problems: what was left out or fixed, counted.
        missing: annotated images that are not in the folder; their records are left out.

    Raises:
        InputError: a missing or malformed file, ids that contradict each other, an unknown category name, or
            a folder that holds none of the images.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path | None,
        categories: Sequence[str] | None = None,
        keep_empty: bool = True,
        content: dict[str, Any] | None = None,
    ) -> None:
        path = Path(annotations)
        content = content or read_instances(path)
        self.problems: dict[str, int] = {}
        self.missing: list[Path] = []
        ids = category_ids_by_name(content["categories"], path)
        self.categories: tuple[str, ...] = tuple(ids)
        self.category_ids: tuple[int, ...] = tuple(ids.values())
        self.frequencies = frequencies(content["categories"])
        records = self._images(content["images"], path, None if images is None else ImageRoot(images))
        self._records = self._with_boxes(records, content["annotations"], path)
        if categories is not None:
            chosen = self.restrict(categories, keep_empty)
            self.categories, self.category_ids = chosen.categories, chosen.category_ids
            self.frequencies, self._records = chosen.frequencies, chosen._records
        elif not keep_empty:
            self._records = [record for record in self._records if not _is_empty(record)]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        """Returns an `ImageAnnotations`, or a list of them for a slice."""
        return self._records[index]

    def __iter__(self) -> Iterator[ImageAnnotations]:
        return iter(self._records)

    def restrict(self, names: Sequence[str], keep_empty: bool = True) -> CocoDetection:
        """Returns a dataset that knows only these categories: no box of another is in it.

        Args:
            names: categories, in the order that labels shall count them.
            keep_empty: whether to keep images in which no single object is left.

        Raises:
            InputError: a name that the annotations do not have, or one that stands twice.
        """
        if len(set(names)) < len(names):
            repeated = sorted({name for name in names if list(names).count(name) > 1})
            raise InputError(
                f"categories: {', '.join(map(repr, repeated))} given more than once; give each once"
            )
        unknown = [name for name in names if name not in self.categories]
        if unknown:
            hint = did_you_mean(unknown[0], list(self.categories))
            raise InputError(
                f"categories: {len(unknown)} unknown to the annotations, first {unknown[0]!r}; {hint}"
            )
        old_labels = [self.categories.index(name) for name in names]
        new_label = torch.full((len(self.categories),), -1, dtype=torch.int64)
        new_label[old_labels] = torch.arange(len(names))
        records = []
        for record in self._records:
            labels = new_label[record.labels]
            kept = dataclasses.replace(record, labels=labels)._pick(labels >= 0)
            if keep_empty or not _is_empty(kept):
                records.append(kept)
        return self._derived(old_labels, records)

    def without_crowds(self) -> CocoDetection:
        """Returns the dataset with the boxes of single objects only: what training sees."""
        records = [record.without_crowds() for record in self._records]
        return self._derived(range(len(self.categories)), records)

    def _derived(self, labels: Sequence[int], records: list[ImageAnnotations]) -> CocoDetection:
        """Returns a dataset of these records and of the categories that had these labels."""
        derived = object.__new__(CocoDetection)
        derived.categories = tuple(self.categories[label] for label in labels)
        derived.category_ids = tuple(self.category_ids[label] for label in labels)
        derived.frequencies = tuple(self.frequencies[label] for label in labels)
        derived._records = records
        derived.problems, derived.missing = dict(self.problems), list(self.missing)
        return derived

    def report(self) -> str:
        """Returns one line: how many images and boxes there are and what was left out."""
        boxes = sum(len(record.boxes) for record in self._records)
        line = f"{len(self)} images, {boxes} boxes in {len(self.categories)} categories"
        problems = ", ".join(f"{count} {what}" for what, count in self.problems.items())
        return f"{line}; left out or fixed: {problems}" if problems else line

    def _count(self, what: str, count: int) -> None:
        if count:
            self.problems[what] = self.problems.get(what, 0) + count

    def _images(
        self, entries: list[dict[str, Any]], path: Path, root: ImageRoot | None
    ) -> list[ImageAnnotations]:
        """Returns records without boxes yet."""
        if not entries:
            raise InputError(f"annotations file {path} lists no images")
        records: dict[int, ImageAnnotations] = {}
        none = torch.zeros(0, dtype=torch.int64)
        for place, entry in enumerate(entries):
            image_id, name, height, width = image_fields(entry, path, place)
            file = Path(name) if root is None else root.path(name, f"annotations file {path}")
            if image_id in records:
                if records[image_id].path != file:
                    raise InputError(
                        f"{path}: image id {image_id} is used for both {records[image_id].path.name} and "
                        f"{file.name}; give every image its own id"
                    )
                self._count("images listed twice", 1)
                continue
            records[image_id] = ImageAnnotations(
                image_id, file, height, width, torch.zeros(0, 4), none, none.bool()
            )
            if root is not None and not root.has(name):
                self.missing.append(file)
        if records and len(self.missing) == len(records):
            raise InputError(
                f"none of the {len(records)} images of {path} is in {root} (first: "
                f"{self.missing[0].name}); give the folder or the tars that the file names are relative to"
            )
        self._count("images whose file is missing", len(self.missing))
        return list(records.values())

    def _with_boxes(
        self, records: list[ImageAnnotations], entries: list[dict[str, Any]], path: Path
    ) -> list[ImageAnnotations]:
        """Hands each record its boxes, and drops the records whose image is missing."""
        index_of = {record.image_id: index for index, record in enumerate(records)}
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        columns = annotation_columns(entries, path)
        image = np.array([index_of.get(value, -1) for value in columns.image_ids], dtype=np.int64)
        label = np.array([label_of.get(value, -1) for value in columns.category_ids], dtype=np.int64)
        xywh = torch.from_numpy(columns.boxes)  # [N, 4] float64
        sizes = torch.tensor([[r.height, r.width] for r in records], dtype=torch.float64).reshape(-1, 2)
        keep = np.ones(len(entries), dtype=bool)
        keep &= self._drop("annotations of an unknown image", image < 0, keep)
        keep &= self._drop("annotations of an unknown category", label < 0, keep)
        keep &= self._drop("annotations that stand twice", repeated_annotations(columns, entries), keep)
        no_area = ~(xywh[:, 2:] > 0).all(1).numpy()
        keep &= self._drop("boxes of no area", no_area, keep)

        kept = torch.from_numpy(np.flatnonzero(keep))
        owner = torch.from_numpy(image)[kept]
        whole = xywh_to_xyxy(xywh[kept])
        clipped = clip_boxes(whole, sizes[owner])
        outside = ~(clipped[:, 2:] > clipped[:, :2]).all(1)
        over = ((clipped - whole).abs() > ROUNDING).any(1) & ~outside
        self._count("boxes outside their image", int(outside.sum()))
        self._count("boxes cut at the image's edge", int(over.sum()))

        kept, owner, boxes = kept[~outside], owner[~outside], clipped[~outside].float()
        order = owner.argsort(stable=True)
        ends = torch.bincount(owner, minlength=len(records)).cumsum(0).tolist()
        boxes, kept = boxes[order], kept[order]
        labels, crowd = torch.from_numpy(label)[kept], torch.from_numpy(columns.iscrowd)[kept]
        missing = set(self.missing)
        filled = []
        for record, start, end in zip(records, [0, *ends[:-1]], ends, strict=True):
            if record.path not in missing:
                mine = slice(start, end)
                filled.append(
                    dataclasses.replace(record, boxes=boxes[mine], labels=labels[mine], iscrowd=crowd[mine])
                )
        return filled

    def _drop(
        self, what: str, bad: np.ndarray[Any, Any], among: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Counts the bad ones among those still kept; returns the good ones."""
        self._count(what, int((bad & among).sum()))
        return ~bad


def _is_empty(record: ImageAnnotations) -> bool:
    return not bool((~record.iscrowd).any())
