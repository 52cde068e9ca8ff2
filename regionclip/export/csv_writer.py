"""Label writer for CSV: one row per box."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing
from clip_base.storage.tables import TableWriter
from regionclip.structures.labels import LabeledImage, LabelTarget

COLUMNS = ("file_name", "width", "height", "name", "x1", "y1", "x2", "y2", "score", "ignored")


class CsvWriter:
    """A CSV file with a row per box, corners in pixels from 0; an image without boxes has a bare row."""

    def __init__(self, target: LabelTarget) -> None:
        self.target = target
        self._closing = contextlib.ExitStack()

    def is_complete(self) -> bool:
        """See `LabelWriter`."""
        if self.target.out.exists():
            raise InputError(f"{self.target.out} already exists; delete it or give another out=")
        return False

    def __enter__(self) -> CsvWriter:
        temporary = self._closing.enter_context(replacing(self.target.out))
        file = self._closing.enter_context(temporary.open("w", encoding="utf-8", newline=""))
        self._table = TableWriter(file)
        self._table.writerow(COLUMNS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.__exit__(kind, error, trace)

    def add(self, image: LabeledImage) -> None:
        """See `LabelWriter`."""
        start: list[Any] = [image.file_name, image.width, image.height]
        if not image.boxes:
            self._table.writerow(start + [""] * (len(COLUMNS) - len(start)))
        for row, (box, label) in enumerate(zip(image.boxes, image.labels, strict=True)):
            score = "" if image.scores is None else f"{image.scores[row]:.5f}"
            ignored = int(bool(image.ignored and image.ignored[row]))
            corners = [f"{side:.2f}" for side in box]
            self._table.writerow([*start, self.target.categories[label], *corners, score, ignored])
