"""Pairs in units that are read from their start to their end: what processes share and resume by.

A unit is a tar, some row groups of a Parquet file, or a file of lines, see `lines`. Tars and Parquet are read
as they are, whatever their size, and give tars and Parquet.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_base.data.inputs import told_apart, unique_stems
from clip_base.data.parquet import DOWNLOADED, STATUS, ParquetConfig, parquet_texts, table_files
from clip_base.data.sources import columns_in, columns_wanted
from clip_base.data.webdataset import WebdatasetConfig, records_of, stream_records
from clip_base.runtime.errors import InputError
from clip_base.storage.files import absolute_path, existing, replacing, write_text
from clip_base.storage.parquet_files import open_parquet
from clip_base.storage.remote import RemoteError, address_of
from clip_base.storage.spool import is_gzipped
from clip_base.storage.tars import Packed, add_member, addresses, stream

ROWS_PER_UNIT = 100_000  # rows that a unit of Parquet has at least; a row group is not divided
_BATCH = 1024  # rows of Parquet that are copied at once, images included


@dataclass(frozen=True)
class Unit:
    """A part of the pairs.

    Attributes:
        name: of its files.
        path: of the tar, the Parquet file or the file of lines.
        groups: the first row group and the one behind the last, of Parquet.
    """

    name: str
    path: str
    groups: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Record:
    """A pair without its image.

    Attributes:
        key: what identifies it among all, wherever its files stand in the list.
        captions: its texts.
        fault: why it cannot be used; "" for one that can.
    """

    key: str
    captions: tuple[str, ...]
    fault: str = ""


class Units(Protocol):
    """Pairs of one kind."""

    ending: str
    """of the files that `write` writes"""

    def units(self) -> list[Unit]:
        """Returns all units, in order."""

    def read(self, unit: Unit) -> Iterator[Record]:
        """Yields all records of a unit, usable or not, in order."""

    def write(self, unit: Unit, kept: Collection[int], path: Path) -> None:
        """Writes some of a unit's records, by their places in it, atomically."""


class TarUnits:
    """Webdataset tars, gzipped or not, here or at addresses.

    Args:
        config: which tars, and which of their members are texts.
        index: write lines, not tars.
    """

    def __init__(self, config: WebdatasetConfig, index: bool) -> None:
        self.config, self.index = config, index
        self.ending = ".jsonl" if index else ".tar"

    def units(self) -> list[Unit]:
        """Returns one unit per tar, named after it."""
        tars = addresses(self.config.shards)
        sealed = self.index and next((tar for tar in tars if address_of(tar) or is_gzipped(Path(tar))), "")
        if sealed:
            raise InputError(f"output=index needs uncompressed tars here, of which {sealed} is none: omit it")
        return [Unit(name, tar) for name, tar in zip(unique_stems(tars), tars, strict=True)]

    def read(self, unit: Unit) -> Iterator[Record]:
        """Yields the records of a tar; what is lost behind a damage counts as one."""
        for record in stream_records(unit.path, self.config, images=False):
            fault = record.fault or ("" if record.captions else f"{unit.path}/{record.key}: no caption")
            yield Record(f"{unit.name}/{record.number}", record.captions, fault)

    def write(self, unit: Unit, kept: Collection[int], path: Path) -> None:
        """Copies records with all their members, or writes a line for each."""
        wanted = frozenset(kept)
        if self.index:
            lines = [
                json.dumps({"image": f"{absolute_path(unit.path)}/{record.image.name}", "caption": texts})
                for record in stream_records(unit.path, self.config, images=False)
                if record.number in wanted and record.image is not None
                for texts in [list(record.captions)]
            ]
            write_text(path, "".join(line + "\n" for line in lines))
            return
        with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
            for number, (_, record) in enumerate(records_of(self._members(unit.path))):
                for member in record.values() if number in wanted else ():
                    add_member(tar, member.name, member.data or b"")

    def _members(self, tar: str) -> Iterator[tuple[str, Packed]]:
        """Yields a tar's members up to where it is damaged, which `read` has told."""
        try:
            for member in stream(tar, lambda name: True):
                yield member.name, member
        except RemoteError:
            raise
        except InputError:
            return


class ParquetUnits:
    """Tables of images, of their paths or of their addresses; a row is a pair, and keeps all its columns.

    Args:
        config: which table, and its columns.
    """

    ending = ".parquet"

    def __init__(self, config: ParquetConfig) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        """Returns the row groups of all files, in units of about `ROWS_PER_UNIT` rows."""
        files = [str(file) for file in table_files(existing(self.config.file, "Parquet table"))]
        stems = told_apart(files, lambda parts: "-".join(parts).removesuffix(".parquet").replace("/", ""))
        assert stems is not None  # files of one folder have different paths
        units = []
        for name, file in zip(stems, files, strict=True):
            with open_parquet(file) as opened:
                self._columns(opened.schema_arrow.names, file)
                sizes = [opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)]
            for first, last in _groups(sizes):
                units.append(Unit(f"{name}-{first:05d}", file, (first, last)))
        return units

    def _columns(self, names: list[str], file: str) -> tuple[str, str]:
        """Returns the columns of images and of captions."""
        wanted = columns_wanted(self.config.image_column, self.config.caption_column)
        return columns_in(names, wanted, f"Parquet table {file}")

    def read(self, unit: Unit) -> Iterator[Record]:
        """Yields the rows of a unit without reading images."""
        with open_parquet(unit.path) as file:
            columns = [self._columns(file.schema_arrow.names, unit.path)[1]]
            columns += [STATUS] if STATUS in file.schema_arrow.names else []
            number = 0
            for batch in file.iter_batches(row_groups=range(*unit.groups), columns=columns):
                texts = batch.column(0).to_pylist()
                states = batch.column(1).to_pylist() if len(columns) > 1 else [None] * len(texts)
                for value, state in zip(texts, states, strict=True):
                    where = f"{unit.path}, row {number} of row groups {unit.groups[0]} and on"
                    found = tuple(parquet_texts(value, Path(unit.path), number))
                    fault = "" if found else f"{where}: no caption"
                    if isinstance(state, str) and state.startswith("failed_to_") and state != DOWNLOADED:
                        fault = f"{where}: {state}"  # of img2dataset
                    yield Record(f"{unit.name}/{number}", found, fault)
                    number += 1

    def write(self, unit: Unit, kept: Collection[int], path: Path) -> None:
        """Copies rows with all their columns."""
        wanted = np.fromiter(kept, np.int64, len(kept))
        with (
            open_parquet(unit.path) as file,
            replacing(path) as temporary,
            pq.ParquetWriter(temporary, file.schema_arrow) as writer,
        ):
            start = 0
            for batch in file.iter_batches(_BATCH, row_groups=range(*unit.groups)):
                rows = np.zeros(len(batch), bool)
                rows[wanted[(wanted >= start) & (wanted < start + len(batch))] - start] = True
                writer.write_batch(batch.filter(pa.array(rows)))
                start += len(batch)


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Yields ranges of row groups of `ROWS_PER_UNIT` rows or a little more."""
    first, rows = 0, 0
    for number, size in enumerate(sizes):
        rows += size
        if rows >= ROWS_PER_UNIT or number == len(sizes) - 1:
            yield first, number + 1
            first, rows = number + 1, 0
