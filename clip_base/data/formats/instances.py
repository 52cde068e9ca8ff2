"""Annotations that are collected image by image, and become content in COCO's instances form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clip_base.data.coco import is_in_pixels
from clip_base.runtime.errors import InputError, quote


@dataclass
class Instances:
    """Images with named boxes, as a reader finds them.

    Attributes:
        where: the file or folder, for messages.
        names: the categories in order; more may come with `add_box`, and are then sorted by name.
    """

    where: str
    names: Sequence[str] = ()
    _images: list[dict[str, Any]] = field(default_factory=list)
    _boxes: list[tuple[int, str, list[float], bool]] = field(default_factory=list)
    _files: set[str] = field(default_factory=set)

    def add_image(self, file_name: str, size: tuple[int, int]) -> int:
        """Adds an image and returns its id, which counts from 1.

        Args:
            file_name: relative to the images folder.
            size: (height, width) in pixels, upright.

        Raises:
            InputError: the image was added before, or has no size.
        """
        if file_name in self._files:
            raise InputError(f"{self.where} describes image {quote(file_name)} twice; leave one out")
        if min(size) < 1:
            raise InputError(
                f"{self.where}: image {quote(file_name)} is said to be {size[1]} pixels wide and {size[0]} "
                "high; correct its size"
            )
        self._files.add(file_name)
        height, width = size
        image_id = len(self._images) + 1
        self._images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        return image_id

    def add_box(
        self, image_id: int, name: str, corners: Sequence[float], place: str, ignored: bool = False
    ) -> None:
        """Adds a box.

        Args:
            image_id: its image, see `add_image`.
            name: its category.
            corners: (x1, y1, x2, y2) in pixels of the upright image.
            place: where it stands, for messages.
            ignored: whether evaluation and training ignore it, as they do COCO's crowds.

        Raises:
            InputError: a corner is no finite number, or the corners are in the wrong order.
        """
        x1, y1, x2, y2 = corners
        if not is_in_pixels(*corners) or x2 < x1 or y2 < y1:
            raise InputError(
                f"{place}: a box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}); it needs finite numbers, the "
                "left upper corner first"
            )
        self._boxes.append((image_id, name, [x1, y1, x2 - x1, y2 - y1], ignored))

    def to_coco(self) -> dict[str, Any]:
        """Returns the content in COCO's format; category ids count from 1."""
        names = list(self.names) or sorted({name for _, name, _, _ in self._boxes})
        ids = {name: number for number, name in enumerate(names, 1)}
        unknown = next((name for _, name, _, _ in self._boxes if name not in ids), None)
        if unknown is not None:
            raise InputError(f"{self.where}: {quote(unknown)} is not among its categories; add it to them")
        return {
            "images": self._images,
            "annotations": [
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": ids[name],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(ignored),
                }
                for number, (image_id, name, box, ignored) in enumerate(self._boxes, 1)
            ],
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        }


def number_of(value: Any, place: str, what: str) -> float:
    """Returns the finite number that a text stands for; InputError, with the place, for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{place}: {what} must be a number, found {quote(value)}")
    return number


def around(points: Iterable[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Returns the smallest box (x1, y1, x2, y2) around points (x, y)."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def rotated(
    corners: Sequence[float], degrees: float, pivot: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Returns the upright box around a box that is rotated clockwise about a point.

    Args:
        corners: (x1, y1, x2, y2) before the rotation.
        degrees: clockwise, as the image is seen (y grows downward).
        pivot: (x, y).
    """
    x1, y1, x2, y2 = corners
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    px, py = pivot
    return around(
        (px + (x - px) * cosine - (y - py) * sine, py + (x - px) * sine + (y - py) * cosine)
        for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    )
