"""Image-text pairs from Parquet: paths of images, or the images themselves, and captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_base.data.sources import (
    CAPTION_COLUMN_HELP,
    IMAGE_COLUMN_HELP,
    Pair,
    Pairs,
    columns_in,
    columns_wanted,
    grouped,
)
from clip_base.images.folders import list_files
from clip_base.images.headers import Embedded
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError, note, quote
from clip_base.storage.files import existing
from clip_base.storage.parquet_files import open_parquet

STATUS, DOWNLOADED = "status", "success"  # img2dataset's column, and its word for an image that it has got


@dataclass
class ParquetConfig:
    """A Parquet table with an image and one or several captions per row."""

    file: str = option(REQUIRED, "Parquet file, or a folder of them")
    images: str = option("", "folder that image paths are relative to; empty: the table's own")
    image_column: str = option(
        "",
        f"{IMAGE_COLUMN_HELP}; of paths, of encoded images, or of {{bytes, path}} as Hugging Face datasets "
        "have them",
    )
    caption_column: str = option("", f"{CAPTION_COLUMN_HELP}; of texts or of lists of texts")


class ParquetSource:
    """Parquet tables of image paths or of images. Images in the table stay encoded in memory.

    A table of images that memory does not hold belongs into webdataset shards.
    """

    def __init__(self, config: ParquetConfig) -> None:
        self.config = config

    def pairs(self) -> Pairs:
        """Returns one pair an image: rows of one path are its several captions."""
        path = existing(self.config.file, "Parquet table")
        images, captions, column = self._columns(path)
        texts = [parquet_texts(value, path, row) for row, value in enumerate(captions)]
        first: Any = next((value for value in images if value is not None), "")
        if isinstance(first, str):
            rows = [
                (image or "", text) for image, own in zip(images, texts, strict=True) for text in own or [""]
            ]
            own_folder = path if path.is_dir() else path.parent
            return grouped(rows, self.config.images, own_folder, f"Parquet table {path}")
        if not isinstance(first, bytes | dict) or (isinstance(first, dict) and "bytes" not in first):
            raise InputError(
                f"{path}: column {column!r} holds {type(first).__name__}; "
                "it must hold paths, encoded images, or {bytes, path}"
            )
        found = [
            Pair(Embedded(_bytes(image), f"{path}, row {row}"), tuple(" ".join(text.split()) for text in own))
            for row, (image, own) in enumerate(zip(images, texts, strict=True))
            if own
        ]
        if len(found) < len(images):
            lacking = len(images) - len(found)
            note(f"Parquet table {path}: {lacking:,} of {len(images):,} rows lack a caption and are left out")
        return found

    def _columns(self, path: Path) -> tuple[list[Any], list[Any], str]:
        """Returns the images, the captions, and the name of the images' column."""
        usual = columns_wanted(self.config.image_column, self.config.caption_column)
        wanted: tuple[str, ...] = ()
        images, captions, status = list[Any](), list[Any](), list[Any]()
        for file in table_files(path):
            with open_parquet(file) as opened:
                names = opened.schema_arrow.names
                # Those of the first file hold for all.
                wanted = columns_in(names, [(one,) for one in wanted] or usual, f"Parquet table {file}")
                table = opened.read([*wanted, STATUS] if STATUS in names else wanted)
                images += table.column(wanted[0]).to_pylist()
                captions += table.column(wanted[1]).to_pylist()
                status += table.column(STATUS).to_pylist() if STATUS in names else []
        kept = _downloaded(status, path) if len(status) == len(images) else range(len(images))
        return [images[row] for row in kept], [captions[row] for row in kept], wanted[0]


def table_files(path: Path) -> list[Path]:
    """Returns a table's files; a folder may hold other files, as img2dataset leaves its statistics in it."""
    if not path.is_dir():
        return [path]
    files = list_files(path, (".parquet",), what="folder").files
    files = [file for file in files if not any(part[0] == "_" for part in file.relative_to(path).parts)]
    if not files:
        raise InputError(f"folder {path} has no .parquet files; give a folder of them, or a file")
    return files


def _downloaded(status: list[Any], path: Path) -> Sequence[int]:
    """Returns the rows whose images img2dataset has got; notes how many it has not, and why."""
    counts = Counter(status)
    failed = {str(value): count for value, count in counts.items() if str(value).startswith("failed_to_")}
    if DOWNLOADED not in counts or len(failed) < len(counts) - 1:
        return range(len(status))  # another column of that name
    if failed:
        told = ", ".join(f"{count:,} {value}" for value, count in sorted(failed.items()))
        note(f"Parquet table {path}: {sum(failed.values()):,} of {len(status):,} rows are left out: {told}")
    return [row for row, value in enumerate(status) if value == DOWNLOADED]


def parquet_texts(value: Any, path: Path, row: int) -> list[str]:
    """Returns the texts in a row's cell, but for empty ones; InputError when it holds something else."""
    texts = value if isinstance(value, list) else [value]
    wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(
            f"{path}, row {row}: a caption must be a text, found {quote(wrong)}; set source.caption_column="
        )
    return [text for text in texts if text and text.strip()]


def _bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data or b""  # an empty one does not decode: it is skipped and listed
