"""Labeled images, and the protocol of label writers.

A label writer is a class of one `LabelTarget`, group `regionclip.label_writers`. It is asked whether the
labels already exist, then entered, given one image after another, and left; files appear whole or not at all.
"""

# N boxes of an image
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from clip_base.jobs import plugins

LABEL_WRITERS = "regionclip.label_writers"
LABEL_FILES = {"coco": "instances.json", "csv": "boxes.csv"}  # formats of one file, and its usual name


@dataclass(frozen=True)
class LabelTarget:
    """Where labels go, and what they are of.

    Attributes:
        out: the file or folder to write.
        categories: C names; labels count them.
        images_folder: the folder that the images' file names are relative to; "": the user named none.
        info: how the labels were made, as plain values; equal ones make equal labels.
    """

    out: Path
    categories: Sequence[str]
    images_folder: str
    info: dict[str, Any]


@dataclass(frozen=True)
class LabeledImage:
    """An image with its labels.

    Attributes:
        image_id: the image's id in its dataset.
        file_name: relative to the images folder.
        height: in pixels.
        width: in pixels.
        boxes: N boxes (x1, y1, x2, y2) in pixels of the original image.
        labels: of each box, indices of the categories.
        scores: of each box, in [0, 1]; None: the boxes are annotations, which have none.
        ignored: whether each box is a crowd, or difficult, which evaluation ignores; empty: none is.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    boxes: list[list[float]]
    labels: list[int]
    scores: list[float] | None
    ignored: Sequence[bool] = ()


class LabelWriter(Protocol):
    """What the job `export` asks of a label writer, whose constructor takes a `LabelTarget`."""

    def is_complete(self) -> bool:
        """Whether the same labels already exist.

        Raises:
            InputError: the place holds something else.
        """

    def __enter__(self) -> Self:
        """Begins to write."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the labels; after an error none of them count as complete."""

    def add(self, image: LabeledImage) -> None:
        """Writes the labels of one image."""


def write_labels(name: str, target: LabelTarget, images: Iterable[LabeledImage]) -> bool:
    """Writes labels with a writer of the group; returns False when the same labels already exist.

    Raises:
        InputError: there is no such writer, or the place holds something else.
    """
    writer: LabelWriter = plugins.load(LABEL_WRITERS, name)(target)
    if writer.is_complete():
        return False
    with writer:
        for image in images:
            writer.add(image)
    return True
