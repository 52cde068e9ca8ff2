"""Image-text pairs from Parquet: paths of images, or the images themselves, and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_base.data.sources import Pair, Pairs, grouped
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError
from clip_base.runtime.files import existing


@dataclass
class ParquetConfig:
    """A Parquet table with an image and one or several captions a row."""

    file: str = option(REQUIRED, "Parquet file, or a folder of them")
    images: str = option("", "folder that image paths are relative to; empty: the table's own")
    image_column: str = option(
        "image", "column of paths, of encoded images, or of {bytes, path} as Hugging Face datasets have them"
    )
    caption_column: str = option("caption", "column of texts or of lists of texts")


@dataclass(frozen=True, eq=False)
class Embedded:
    """An encoded image in memory.

    Attributes:
        data: the encoded image.
        name: where it stands.
    """

    data: bytes
    name: str

    def read_bytes(self) -> bytes:
        """Returns the encoded image."""
        return self.data

    def __str__(self) -> str:
        return self.name


class ParquetSource:
    """Parquet tables of image paths or of images. Images in the table stay encoded in memory.

    A table of images that memory does not hold belongs into webdataset shards.
    """

    def __init__(self, config: ParquetConfig) -> None:
        self.config = config

    def pairs(self) -> Pairs:
        """Returns one pair an image: rows of one path are its several captions."""
        path = existing(self.config.file, "Parquet table")
        images, captions = self._columns(path)
        texts = [_texts(value, path, row) for row, value in enumerate(captions)]
        first: Any = next((value for value in images if value is not None), "")
        if isinstance(first, str):
            rows = [(image or "", text) for image, own in zip(images, texts, strict=True) for text in own]
            own_folder = path if path.is_dir() else path.parent
            return grouped(rows, Path(self.config.images) if self.config.images else own_folder)
        if not isinstance(first, bytes | dict) or (isinstance(first, dict) and "bytes" not in first):
            raise InputError(
                f"{path}: column {self.config.image_column!r} holds {type(first).__name__}; "
                "it must hold paths, encoded images, or {bytes, path}"
            )
        return [
            Pair(Embedded(_bytes(image), f"{path}, row {row}"), tuple(" ".join(text.split()) for text in own))
            for row, (image, own) in enumerate(zip(images, texts, strict=True))
            if any(text.strip() for text in own)
        ]

    def _columns(self, path: Path) -> tuple[list[Any], list[Any]]:
        wanted = [self.config.image_column, self.config.caption_column]
        try:
            names = pq.ParquetDataset(path).schema.names
            for column in wanted:
                if column not in names:
                    raise InputError(f"{path} has no column {column!r}; it has {', '.join(names)}")
            table = pq.read_table(path, columns=wanted)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        return table.column(wanted[0]).to_pylist(), table.column(wanted[1]).to_pylist()


def _texts(value: Any, path: Path, row: int) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"{path}, row {row}: a caption must be a text, found {wrong!r}; set caption_column=")
    return [text for text in texts if text and text.strip()]


def _bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data or b""  # an empty one does not decode: it is skipped and listed
