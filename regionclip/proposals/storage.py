"""Proposals in files: COCO's results format, or Parquet with one row per box; read in parts."""

# n boxes of one image
from __future__ import annotations

import contextlib
import functools
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_base.data.coco import coco_entry
from clip_base.runtime.errors import InputError
from clip_base.storage.files import existing, replacing
from clip_base.storage.parquet_files import open_parquet
from regionclip.data.region_tables import BOX, OBJECTNESS, numbers, require_rows
from regionclip.proposals.origins import Origins
from regionclip.structures.boxes import xyxy_to_xywh

# The columns that shards of mined pairs have too, so that those can be read as proposals.
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("box", pa.list_(pa.float32(), 4)),  # x1, y1, x2, y2 in pixels of the original image
        ("objectness", pa.float32()),
    ]
)
# Where the images have no annotations, whose ids would be known to others: what they are found by.
ORIGINS = pa.schema(
    [("file_name", pa.string()), ("key", pa.string()), ("height", pa.int32()), ("width", pa.int32())]
)
_GROUP = 20_000  # boxes, at least, of a row group: what is read at once


class Writer(Protocol):
    """Takes proposals image by image."""

    def add(self, image_id: int, boxes: Tensor, scores: Tensor, **origin: str | int) -> None:
        """Writes an image's [n, 4] boxes (x1, y1, x2, y2), in original pixels, and [n] scores.

        Args:
            image_id: the image's.
            boxes: its boxes.
            scores: their objectness.
            origin: what `ORIGINS` names, of a file `with_origins`.
        """


@contextlib.contextmanager
def writing(path: Path, with_origins: bool = False) -> Iterator[Writer]:
    """Yields a writer of `path`, .json or .parquet; the file appears whole at the end, or not at all.

    Args:
        path: the file.
        with_origins: whether each box also says what its image is found by, see `ORIGINS`.
    """
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            schema = pa.schema([*SCHEMA, *ORIGINS]) if with_origins else SCHEMA
            with pq.ParquetWriter(temporary, schema, compression="zstd") as file:
                table = _TableWriter(file)
                yield table
                table.flush()
        else:
            with temporary.open("w", encoding="utf-8") as text:
                text.write("[")
                yield _JsonWriter(text)
                text.write("]\n")


class _JsonWriter:
    def __init__(self, file: TextIO) -> None:
        self.file, self.separator = file, ""

    def add(self, image_id: int, boxes: Tensor, scores: Tensor, **origin: str | int) -> None:
        for box, score in zip(xyxy_to_xywh(boxes.double()).tolist(), scores.tolist(), strict=True):
            entry = coco_entry(image_id, 1, box, round(score, 5), digits=2, **origin)
            self.file.write(self.separator + json.dumps(entry))
            self.separator = ", "


class _TableWriter:
    def __init__(self, file: pq.ParquetWriter) -> None:
        self.file = file
        self.ids, self.boxes, self.scores = array("q"), array("f"), array("f")
        self.origins: list[dict[str, str | int]] = []

    def add(self, image_id: int, boxes: Tensor, scores: Tensor, **origin: str | int) -> None:
        self.ids.extend([image_id] * len(boxes))
        self.origins.extend([origin] * len(boxes))
        self.boxes.extend(boxes.flatten().tolist())
        self.scores.extend(scores.tolist())
        if len(self.ids) >= _GROUP:
            self.flush()

    def flush(self) -> None:
        if self.ids:
            boxes = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(self.boxes)), 4)
            columns = [pa.array(np.asarray(self.ids)), boxes, pa.array(np.asarray(self.scores))]
            if len(self.file.schema) > len(SCHEMA):
                origins = pa.Table.from_pylist(self.origins, ORIGINS)
                columns += [column.combine_chunks() for column in origins.columns]
            self.file.write_table(pa.table(columns, schema=self.file.schema))
        self.ids, self.boxes, self.scores = array("q"), array("f"), array("f")
        self.origins = []


_KEYS = pa.schema([("image_id", pa.int64()), *ORIGINS])


class ProposalTable:
    """Looks images up in Parquet files with the columns of `SCHEMA`.

    In memory are which row group holds which image, and the last few groups that were read: images in the
    order in which they were written cost one pass over the file.

    Args:
        path: a file, or a folder of them, such as shards of mined pairs.

    Attributes:
        origins: what each image is found by.

    Raises:
        InputError: there is no such file, it is damaged, lacks a column, or has an id of two images.
    """

    def __init__(self, path: str | Path) -> None:
        path = existing(path, "proposals file")
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files:
            raise InputError(f"folder {path} holds no .parquet file with proposals")
        self.origins = Origins(f"proposals file {path}")
        rows = [row for file in self.files for row in _index(file, self.origins)]
        self._groups = [(file, group) for file, group, _ in rows]
        ids = np.concatenate([np.zeros(0, np.int64), *(found for _, _, found in rows)])
        place = np.repeat(np.arange(len(rows)), [len(found) for _, _, found in rows])
        order = np.argsort(ids, kind="stable")
        self._ids, self._place = ids[order], place[order]
        self._read = functools.lru_cache(maxsize=4)(_read_group)

    def of_image(self, image_id: int) -> tuple[Tensor, Tensor]:
        """Returns an image's [n, 4] boxes (x1, y1, x2, y2) in original pixels and their [n] scores.

        Raises:
            InputError: a box is no box, or a score no probability.
        """
        first, last = (
            np.searchsorted(self._ids, image_id, "left"),
            np.searchsorted(self._ids, image_id, "right"),
        )
        boxes, scores = [torch.zeros(0, 4)], [torch.zeros(0)]
        for place in self._place[first:last].tolist():
            ids, rows, values = self._read(*self._groups[place])
            mine = ids == image_id
            boxes.append(torch.from_numpy(rows[mine]))
            scores.append(torch.from_numpy(values[mine]))
        return torch.cat(boxes), torch.cat(scores)


def _index(path: Path, origins: Origins) -> Iterator[tuple[Path, int, NDArray[np.int64]]]:
    """Yields each row group of a file with the ids of the images in it; adds what they are found by."""
    with open_parquet(path, "proposals file") as file:
        lacking = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
        if lacking:
            found = ", ".join(file.schema_arrow.names[:6])
            raise InputError(
                f"{path} has no column {lacking[0]} (its columns: {found}); proposals in Parquet have "
                f"{', '.join(SCHEMA.names)}, as `regionclip propose format=parquet` writes them"
            )
        for group in range(file.num_row_groups):
            columns = [name for name in _KEYS.names if name in file.schema_arrow.names]
            table = file.read_row_group(group, columns)
            table = table.cast(pa.schema([_KEYS.field(name) for name in columns]))
            images = table.group_by(columns).aggregate([])
            if len(columns) > 1:
                for row in images.to_pylist():
                    origins.add(row, f"proposals file {path}")
            yield path, group, np.unique(images["image_id"].to_numpy())


def _read_group(path: Path, group: int) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Returns a row group's image ids [m], boxes [m, 4] and scores [m], float32."""
    with open_parquet(path, "proposals file") as file:
        table = file.read_row_group(group, SCHEMA.names).cast(SCHEMA).combine_chunks()
        first = sum(file.metadata.row_group(before).num_rows for before in range(group))
    require_rows(table, (BOX, OBJECTNESS), f"proposals file {path}", first)
    boxes, scores = (numbers(table, name).astype(np.float32) for name in ("box", "objectness"))
    return table["image_id"].to_numpy(), boxes, scores
