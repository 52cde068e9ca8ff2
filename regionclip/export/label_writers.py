"""Label writers of COCO's, FiftyOne's and YOLO's layouts, see `regionclip.structures.labels`."""

# N boxes of an image
from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clip_base.data.coco import coco_entry
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, replacing, sweep, write_json, write_text
from clip_base.storage.json_stream import stream_entries
from regionclip.export.images_beside import ImagesBeside, inside
from regionclip.structures.labels import LabeledImage, LabelTarget


class CocoWriter:
    """One JSON file of annotations in COCO's format, written entry by entry; boxes carry a score."""

    def __init__(self, target: LabelTarget) -> None:
        self.target, self.images = target, 0
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
        # The images stand behind the annotations in the file, and in memory they would be too many.
        self._listed = self._closing.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
        listed = [{"id": label + 1, "name": name} for label, name in enumerate(self.target.categories)]
        self._file.write(
            f'{{"info": {_json(self.target.info)},\n"categories": {_json(listed)},\n"annotations": ['
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._file.write('],\n"images": [')
            self._listed.seek(0)
            shutil.copyfileobj(self._listed, self._file)
            self._file.write("]}\n")
        self._closing.__exit__(kind, error, trace)

    def add(self, image: LabeledImage) -> None:
        """See `LabelWriter`."""
        size = {"height": image.height, "width": image.width}
        entry = {"id": image.image_id, "file_name": image.file_name, **size}
        self._listed.write((", " if self.images else "") + _json(entry))
        self.images += 1
        for row, ((x1, y1, x2, y2), label) in enumerate(zip(image.boxes, image.labels, strict=True)):
            self._file.write(",\n" if self.annotations else "\n")
            self.annotations += 1
            sides = (x1, y1, x2 - x1, y2 - y1)
            crowd = int(bool(image.ignored and image.ignored[row]))
            more = {"area": round(sides[2] * sides[3], 3), "iscrowd": crowd}
            score = None if image.scores is None else round(image.scores[row], 5)
            entry = coco_entry(image.image_id, label + 1, sides, score, digits=3, **more)
            annotation = {"id": self.annotations, **entry}
            self._file.write(_json(annotation))


class FiftyOneWriter(CocoWriter):
    """The folder that FiftyOne reads as a COCODetectionDataset; scores become confidences there."""

    def __init__(self, target: LabelTarget) -> None:
        if target.out.is_file():
            raise InputError(
                f"out={target.out} is a file; format=fiftyone writes a folder; give another out="
            )
        require_images(target, "fiftyone")
        super().__init__(replace(target, out=target.out / "labels.json"))

    def __enter__(self) -> FiftyOneWriter:
        super().__enter__()
        self._images = ImagesBeside(self.target.out.parent / "data", self.target.images_folder)
        return self

    def add(self, image: LabeledImage) -> None:
        """See `LabelWriter`; FiftyOne reads images by their names in `data`."""
        inside(self.target.out.parent / "data", Path(image.file_name))
        self._images.add(image.file_name)
        super().add(image)


class FolderWriter(ABC):
    """A folder of labels with `info.json`, which says how they were made and whether they are complete.

    Its subclasses override `begin`, `add` and `end`, and `kind`, the name of the format.
    """

    kind = ""

    def __init__(self, target: LabelTarget) -> None:
        if target.out.is_file():
            raise InputError(
                f"out={target.out} is a file; format={self.kind} makes a folder, give another out="
            )
        require_images(target, self.kind)
        self.target, self.folder = target, target.out.absolute()
        self._info = self.folder / "info.json"

    def is_complete(self) -> bool:
        """See `LabelWriter`."""
        if not self._info.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise InputError(
                    f"{self.target.out} is not empty and was not written by this job; give another out= or "
                    "empty it"
                )
            return False
        # Written before the labels, so that an interrupted export resumes with the same options only.
        found = read_json(self._info, "description of the labels")
        if found.get("info") != self.target.info:
            raise InputError(
                f"{self.target.out} was made with other options or pairs; delete it or give another out="
            )
        return bool(found.get("complete"))

    def __enter__(self) -> Self:
        sweep(self.folder.rglob(".*.tmp"))
        write_json(self._info, {"complete": False, "info": self.target.info}, indent=2)
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
            write_json(self._info, {"complete": True, "info": self.target.info}, indent=2)

    @abstractmethod
    def begin(self) -> None:
        """Prepares the folder."""

    @abstractmethod
    def add(self, image: LabeledImage) -> None:
        """See `LabelWriter`."""

    @abstractmethod
    def end(self) -> None:
        """Writes what stands behind all images."""


class YoloWriter(FolderWriter):
    """One text file per image, with `category x y width height` of each box as shares of the image.

    Ignored boxes are left out: the format has no place for them.
    """

    kind = "yolo"

    def begin(self) -> None:
        """Finds the images, which YOLO's programs look for beside the labels."""
        # The labels of images/a/b.jpg are looked for in labels/a/b.txt.
        self.names: list[str] = []
        self.images = ImagesBeside(self.folder / "images", self.target.images_folder)

    def end(self) -> None:
        """Writes the list of images and `data.yaml`."""
        write_text(self.folder / "train.txt", "".join(self.names))
        listed = "".join(f"  {label}: {_json(name)}\n" for label, name in enumerate(self.target.categories))
        write_text(
            self.folder / "data.yaml",
            f"path: {_json(str(self.folder))}\ntrain: train.txt\nval: train.txt\nnames:\n{listed}",
        )

    def add(self, image: LabeledImage) -> None:
        """See `LabelWriter`."""
        lines = []
        for row, ((x1, y1, x2, y2), label) in enumerate(zip(image.boxes, image.labels, strict=True)):
            if image.ignored and image.ignored[row]:
                continue
            shares = (
                (x1 + x2) / 2 / image.width,
                (y1 + y2) / 2 / image.height,
                (x2 - x1) / image.width,
                (y2 - y1) / image.height,
            )
            lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in shares) + "\n")
        place = inside(self.folder / "labels", Path(image.file_name).with_suffix(".txt"))
        self.images.add(image.file_name)
        write_text(place, "".join(lines))
        self.names.append(f"./images/{image.file_name}\n")


def require_images(target: LabelTarget, kind: str) -> None:
    """Raises an InputError when the user named no folder of images to link to."""
    if not target.images_folder:
        raise InputError(
            f"format={kind} has the images beside the labels: give images=FOLDER, the folder that they are in"
        )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
