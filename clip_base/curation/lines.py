"""Pairs of tables, lists and folders, written as lines that are then read in units.

A row of CSV, TSV or JSON Lines is a pair and keeps all its columns; its image may be an address that was not
downloaded yet. Of other sources a line has an image's path and its texts. What is kept is one file of such
lines, as `clip-base pretrain source.name=jsonl` reads it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from clip_base.curation.units import ParquetUnits, Record, TarUnits, Unit, Units
from clip_base.data.inputs import WEBDATASET, source_root
from clip_base.data.parquet import ParquetConfig
from clip_base.data.sources import (
    SOURCES,
    JsonLinesConfig,
    Pairs,
    Source,
    TableConfig,
    columns_in,
    columns_wanted,
)
from clip_base.data.webdataset import WebdatasetConfig
from clip_base.images.headers import Stored
from clip_base.images.roots import ImageRoot
from clip_base.jobs.config import build_plugin, check
from clip_base.runtime.errors import InputError, quote
from clip_base.runtime.progress import track
from clip_base.storage.files import absolute_path, make_folder, read_json_lines, replacing, write_text
from clip_base.storage.remote import address_of
from clip_base.storage.tables import Table, open_table
from clip_base.storage.tars import Member

TABLE, JSONL, PARQUET = "csv", "jsonl", "parquet"
PER_UNIT = 10_000
_DONE = "lines.done"


def units_of(spec: dict[str, Any], work: Path, index: bool) -> Units:
    """Returns the units of a source.

    Args:
        spec: the source's name and options.
        work: a folder for lines, which `write_lines` has filled for sources that need it.
        index: of tars: write lines that name the images in them, not tars.
    """
    if spec["name"] == WEBDATASET:
        return TarUnits(check(WebdatasetConfig, _options(spec), "source"), index)
    if spec["name"] == PARQUET:
        return ParquetUnits(check(ParquetConfig, _options(spec), "source"))
    return LineUnits(work)


def _options(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "name"}


class LineUnits:
    """Files of lines that `write_lines` has written.

    Args:
        work: their folder.
    """

    ending = ".jsonl"

    def __init__(self, work: Path) -> None:
        self.work = work

    def units(self) -> list[Unit]:
        """Returns one unit per file."""
        return [Unit(path.stem, str(path)) for path in sorted(self.work.glob("lines-*.jsonl"))]

    def read(self, unit: Unit) -> Iterator[Record]:
        """Yields the pairs of a file."""
        for _, entry in read_json_lines(unit.path):
            yield Record(entry["key"], tuple(entry["captions"]), entry["fault"])

    def write(self, unit: Unit, kept: Collection[int], path: Path) -> None:
        """Writes what the source has of each pair as a line."""
        wanted = frozenset(kept)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for place, (_, entry) in enumerate(read_json_lines(unit.path)):
                if place in wanted:
                    file.write(json.dumps(entry["record"], ensure_ascii=False) + "\n")


def write_lines(spec: dict[str, Any], work: Path) -> None:
    """Writes the pairs of a source as lines, unless it is one of tars or Parquet, which need none.

    Raises:
        InputError: the source cannot be read, or has images inside tables.
    """
    if spec["name"] in (WEBDATASET, PARQUET) or (work / _DONE).exists():
        return
    make_folder(work)
    entries = iter(track(_entries(spec), "reading pairs"))
    for number in itertools.count():
        lines = [json.dumps(entry, ensure_ascii=False) for entry in itertools.islice(entries, PER_UNIT)]
        if not lines:
            break
        write_text(work / f"lines-{number:06d}.jsonl", "\n".join(lines) + "\n")
    write_text(work / _DONE, "")


def _entries(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if spec["name"] == TABLE:
        config = check(TableConfig, _options(spec), "source")
        table, names = _table(config)
        rows = itertools.islice(table.rows(), 1, None)
        found = ((number, dict(zip(table.columns, row, strict=True))) for number, row in rows)
        return _of_records(found, *names, config)
    if spec["name"] == JSONL:
        lines = check(JsonLinesConfig, _options(spec), "source")
        records = read_json_lines(lines.file, "JSON Lines file", lines.encoding)
        return _of_records(records, *_keys(lines), lines)
    source: Source = build_plugin(SOURCES, spec)
    return _of_pairs(source.pairs(), source_root(spec))


def _table(config: TableConfig) -> tuple[Table, tuple[str, str]]:
    """Returns a table, and its columns of images and of captions."""
    wanted = columns_wanted(config.image_column, config.caption_column)
    table = open_table(config.file, "table", wanted, config.delimiter, config.encoding)
    names = columns_in(table.columns, wanted, f"table {config.file}")
    for name in names:
        table.index(name)  # an InputError when two columns have it
    return table, names


def _keys(config: JsonLinesConfig) -> tuple[str, str]:
    """Returns the keys of images and captions in a file's first record."""
    wanted = columns_wanted(config.image_key, config.caption_key)
    for number, record in read_json_lines(config.file, "JSON Lines file", config.encoding):
        if isinstance(record, dict):
            return columns_in(list(record), wanted, f"JSON Lines file {config.file}, line {number}", "key")
    return wanted[0][0], wanted[1][0]


def _of_records(
    records: Iterator[tuple[int, Any]],
    image_key: str,
    caption_key: str,
    config: TableConfig | JsonLinesConfig,
) -> Iterator[dict[str, Any]]:
    """Yields a line for each row; its image's path becomes absolute, an address stays."""
    root = ImageRoot(config.images) if config.images else None
    for number, record in records:
        where = f"{config.file}, line {number}"
        image = record.get(image_key) if isinstance(record, dict) else None
        found = record.get(caption_key) if isinstance(record, dict) else None
        texts: list[Any] = found if isinstance(found, list) else [found]
        if not isinstance(image, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{where}: each row needs {image_key!r}, a path or an address, and {caption_key!r}, a text "
                f"or a list of texts; found {quote(record)}"
            )
        captions = [" ".join(text.split()) for text in texts if text.strip()]
        fault = "" if image and captions else f"{where}: no {'caption' if image else 'image'}"
        key = f"{image} {' '.join(captions)}"  # rows of one image are pairs of their own
        if image and "://" not in image:
            path = root.path(image, where) if root else Path(config.file).parent / image
            record = record | {image_key: absolute_path(path)}
        yield {"key": key, "captions": captions, "fault": fault, "record": record}


def _of_pairs(pairs: Pairs, root: str) -> Iterator[dict[str, Any]]:
    folder = Path(root).absolute() if root and address_of(root) is None else None
    for number in range(len(pairs)):
        try:
            pair = pairs[number]
        except InputError as error:  # an image without a text beside it
            yield {"key": str(number), "captions": [], "fault": str(error), "record": None}
            continue
        image, captions = _image_name(pair.image), list(pair.captions)
        inside = folder is not None and Path(image).is_relative_to(folder)
        key = str(Path(image).relative_to(folder)) if inside and folder else image
        record = {"image": image, "caption": captions}
        yield {"key": key, "captions": captions, "fault": "", "record": record}


def _image_name(image: Stored) -> str:
    """Returns the path by which an image is found, also from another folder: a file's, or `TAR/NAME`."""
    if isinstance(image, Path):
        return absolute_path(image)
    if isinstance(image, Member) and address_of(image.tar) is None:
        return absolute_path(str(image))
    raise InputError(
        f"image {image} is inside a table or in a tar at an address, which no list of paths can name: curate "
        "those pairs alone, by source.name=parquet or webdataset"
    )


def write_all(units: Units, parts: list[Path], out: Path) -> Path:
    """Returns what holds all pairs that were kept: the folder of `parts`, or one file of their lines.

    Args:
        units: what wrote the parts.
        parts: in order.
        out: the run's folder.
    """
    if units.ending != ".jsonl":
        return out / "pairs"
    joined = out / "pairs.jsonl"
    with replacing(joined) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return joined
