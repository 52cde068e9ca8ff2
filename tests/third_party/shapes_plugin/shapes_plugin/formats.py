"""Boxes as lines of text, `FILE HEIGHT WIDTH NAME X1 Y1 X2 Y2`: an annotation format and a label writer."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from clip_base.runtime.errors import InputError
from regionclip.structures.labels import LabeledImage, LabelTarget


def read_boxes(path: Path) -> dict[str, Any] | None:
    """Returns the annotations of a `.boxes` file in COCO's format; None for other files."""
    if path.suffix != ".boxes":
        return None
    images: dict[str, dict[str, Any]] = {}
    names: dict[str, int] = {}
    annotations = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            file, height, width, name, *corners = line.split()
            x1, y1, x2, y2 = map(float, corners)
        except ValueError:
            raise InputError(f"{path}, line {number} is not FILE HEIGHT WIDTH NAME X1 Y1 X2 Y2") from None
        size = {"height": int(height), "width": int(width)}
        image = images.setdefault(file, {"id": len(images) + 1, "file_name": file, **size})
        category = names.setdefault(name, len(names) + 1)
        box = [x1, y1, x2 - x1, y2 - y1]
        annotations.append({"id": number, "image_id": image["id"], "category_id": category, "bbox": box})
    categories = [{"id": number, "name": name} for name, number in names.items()]
    return {"images": list(images.values()), "annotations": annotations, "categories": categories}


class BoxesWriter:
    """Writes a `.boxes` file."""

    def __init__(self, target: LabelTarget) -> None:
        self.target, self.lines = target, list[str]()

    def is_complete(self) -> bool:
        """Whether the file already exists."""
        return self.target.out.exists()

    def __enter__(self) -> BoxesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.target.out.write_text("".join(self.lines))

    def add(self, image: LabeledImage) -> None:
        """Adds one line per box."""
        for box, label in zip(image.boxes, image.labels, strict=True):
            corners = " ".join(f"{side:g}" for side in box)
            name = self.target.categories[label]
            self.lines.append(f"{image.file_name} {image.height} {image.width} {name} {corners}\n")
