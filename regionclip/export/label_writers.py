"""Label writers: labeled images as annotations that other programs read, group `regionclip.label_writers`.

A writer is a class of one `LabelTarget`. It is asked whether the labels already exist, then entered, given
one image after another, and left; files appear whole or not at all.
"""

# N boxes of an image
from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from clip_base.data.coco import coco_entry
from clip_base.runtime.errors import InputError
from clip_base.runtime.files import existing, make_folder, read_json, replacing, write_json, write_text
from clip_base.runtime.json_stream import stream_entries

LABEL_WRITERS = "regionclip.label_writers"


@dataclass(frozen=True)
class LabelTarget:
    """Where labels go, and what they are of.

    Attributes:
        out: the file or folder to write.
        categories: C names; labels count them.
        images_folder: the folder that the images' file names are relative to.
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
        scores: of each box, in [0, 1].
    """

    image_id: int
    file_name: str
    height: int
    width: int
    boxes: list[list[float]]
    labels: list[int]
    scores: list[float]


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


class CocoWriter:
    """One JSON file of annotations in COCO's form, written entry by entry; boxes carry a score."""

    def __init__(self, target: LabelTarget) -> None:
        self.target, self.images = target, list[dict[str, Any]]()
        self.annotations = 0
        self._closing = contextlib.ExitStack()

    def is_complete(self) -> bool:
        """See `LabelWriter`."""
        out = self.target.out
        if out.is_dir():
            raise InputError(f"out={out} is a folder; give a file, such as {out / 'instances.json'}")
        if not out.exists():
            return False
        if next(stream_entries(out, "annotations file"), None) == ("info", self.target.info):
            return True
        raise InputError(
            f"{out} already exists and was made with other options or pairs; delete it or give another out="
        )

    def __enter__(self) -> CocoWriter:
        temporary = self._closing.enter_context(replacing(self.target.out))
        self._file = self._closing.enter_context(temporary.open("w", encoding="utf-8"))
        listed = [{"id": label + 1, "name": name} for label, name in enumerate(self.target.categories)]
        self._file.write(
            f'{{"info": {_json(self.target.info)},\n"categories": {_json(listed)},\n"annotations": ['
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._file.write(f'],\n"images": {_json(self.images)}}}\n')
        self._closing.__exit__(kind, error, trace)

    def add(self, image: LabeledImage) -> None:
        """See `LabelWriter`."""
        self.images.append(
            {
                "id": image.image_id,
                "file_name": image.file_name,
                "height": image.height,
                "width": image.width,
            }
        )
        for (x1, y1, x2, y2), label, score in zip(image.boxes, image.labels, image.scores, strict=True):
            self._file.write(",\n" if self.annotations else "\n")
            self.annotations += 1
            sides = (x1, y1, x2 - x1, y2 - y1)
            more = {"area": round(sides[2] * sides[3], 3), "iscrowd": 0}
            entry = coco_entry(image.image_id, label + 1, sides, round(score, 5), digits=3, **more)
            annotation = {"id": self.annotations, **entry}
            self._file.write(_json(annotation))


class FiftyOneWriter(CocoWriter):
    """The folder that FiftyOne reads as a COCODetectionDataset; scores become confidences there."""

    def __init__(self, target: LabelTarget) -> None:
        if target.out.is_file():
            raise InputError(f"out={target.out} is a file; format=fiftyone makes a folder, give another out=")
        super().__init__(replace(target, out=target.out / "labels.json"))

    def __enter__(self) -> FiftyOneWriter:
        super().__enter__()
        link_images(self.target.out.parent / "data", self.target.images_folder)
        return self


class YoloWriter:
    """One text file per image, with `category x y width height` of each box as shares of the image."""

    def __init__(self, target: LabelTarget) -> None:
        if target.out.is_file():
            raise InputError(f"out={target.out} is a file; format=yolo makes a folder, give another out=")
        self.target, self.folder = target, target.out.absolute()
        self.names: list[str] = []
        self._info = self.folder / "info.json"

    def is_complete(self) -> bool:
        """See `LabelWriter`."""
        if not self._info.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise InputError(
                    f"{self.target.out} is not empty and not of this job; give another out= or empty it"
                )
            return False
        # Written before the labels, so that an interrupted export resumes with the same options only.
        found = read_json(self._info, "description of the labels")
        if found.get("info") != self.target.info:
            raise InputError(
                f"{self.target.out} was made with other options or pairs; delete it or give another out="
            )
        return bool(found.get("complete"))

    def __enter__(self) -> YoloWriter:
        write_json(self._info, {"complete": False, "info": self.target.info}, indent=2)
        # YOLO's programs look for the labels of images/a/b.jpg in labels/a/b.txt.
        link_images(self.folder / "images", self.target.images_folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        write_text(self.folder / "train.txt", "".join(self.names))
        listed = "".join(f"  {label}: {_json(name)}\n" for label, name in enumerate(self.target.categories))
        write_text(
            self.folder / "data.yaml",
            f"path: {_json(str(self.folder))}\ntrain: train.txt\nval: train.txt\nnames:\n{listed}",
        )
        write_json(self._info, {"complete": True, "info": self.target.info}, indent=2)

    def add(self, image: LabeledImage) -> None:
        """See `LabelWriter`."""
        lines = []
        for (x1, y1, x2, y2), label in zip(image.boxes, image.labels, strict=True):
            shares = (
                (x1 + x2) / 2 / image.width,
                (y1 + y2) / 2 / image.height,
                (x2 - x1) / image.width,
                (y2 - y1) / image.height,
            )
            lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in shares) + "\n")
        place = inside(self.folder / "labels", Path(image.file_name).with_suffix(".txt"))
        write_text(place, "".join(lines))
        self.names.append(f"./images/{image.file_name}\n")


def inside(folder: Path, name: Path) -> Path:
    """Returns the file `name` in a folder.

    Raises:
        InputError: the name, which comes from data, leads out of the folder.
    """
    if name.is_absolute() or ".." in name.parts:
        raise InputError(f"file name {str(name)!r} leads out of {folder.name}/; nothing was written there")
    return folder / name


def link_images(link: Path, images_folder: str) -> None:
    """Makes a link to the images folder, beside the labels."""
    if not link.is_symlink():
        target = existing(images_folder, "images folder").absolute()
        make_folder(link.parent)
        link.symlink_to(target, target_is_directory=True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
