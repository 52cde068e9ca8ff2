"""Image-text pairs of the region stages, from any source, in units that are read one after the other.

A unit is a tar, which is read from its start to its end, or a range of an index of the source's images. Units
are what processes and machines share, and what an interrupted job repeats at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clip_base.data.inputs import WEBDATASET, source_inputs, source_root, unique_stems
from clip_base.data.sources import SOURCES, Pairs, Source
from clip_base.data.webdataset import WebdatasetConfig, stream_records
from clip_base.images.headers import Stored
from clip_base.images.roots import ImageRoot
from clip_base.jobs.config import Plugin, build_plugin, check, option, plugin
from clip_base.runtime.errors import InputError
from clip_base.storage.files import existing
from clip_base.storage.tars import Member, addresses, names_tars
from regionclip.data.caption_index import (
    CaptionedImageEntry,
    CaptionIndex,
    ImageRange,
    write_caption_index,
    write_pair_index,
)
from regionclip.data.captions import cleaned, storable

_PER_TAR = 1 << 32  # numbers of images in one tar; the tar's own number stands above them
_TABLES = (".csv", ".tsv", ".tab")


@dataclass(kw_only=True)
class PairOptions:
    """Which image-text pairs a job reads: `images` and `captions`, or a `source`."""

    images: str = option("", "folder that the captions' file names are relative to, or webdataset tars")
    captions: str = option(
        "",
        "captions: COCO's JSON, or .jsonl, .csv, .tsv, .parquet with columns of images and captions; empty: "
        "those in the tars",
    )
    source: Plugin = plugin(SOURCES, "none", "source of image-text pairs, instead of images= and captions=")

    def source_options(self) -> dict[str, Any]:
        """Returns the source's name and options, however they were given.

        Raises:
            InputError: neither or both ways are given, or captions are of a kind that has no images.
        """
        if self.source["name"] != "none":
            if self.images or self.captions:
                raise InputError("give source.name=…, or images= and captions=, not both")
            return dict(self.source)
        if not self.images and not self.captions:
            raise InputError("give images=DIR captions=FILE, images=TARS, or source.name=… with its options")
        if not self.captions:
            if not names_tars(self.images):
                raise InputError(
                    f"images={self.images} is not a set of tars: give captions=FILE too, or "
                    f"source.name=folder source.folder={self.images} for texts beside the images"
                )
            return {"name": WEBDATASET, "shards": self.images}
        return _of_file(existing(self.captions, "captions file"), self.images)

    def pair_inputs(self) -> dict[str, Path | str]:
        """Returns what decides the pairs besides the options, for `RunFolder`; tars count by their size."""
        return source_inputs(self.source_options())


def _of_file(captions: Path, images: str) -> dict[str, Any]:
    """Returns the source of a captions file."""
    kind = captions.suffix.lower()
    if kind in _TABLES:
        return {"name": "csv", "file": str(captions), "images": images}
    if kind in (".jsonl", ".ndjson"):
        return {"name": "jsonl", "file": str(captions), "images": images}
    if kind == ".parquet":
        return {"name": "parquet", "file": str(captions), "images": images}
    if kind == ".txt":
        raise InputError(
            f"captions={captions} is a text of captions, which says nothing of their images; give COCO's "
            "JSON, or .jsonl, .csv or .tsv with an image in each row"
        )
    if not images:
        raise InputError(
            f"captions={captions} needs images=, the folder or tars that its names are relative to"
        )
    return {"name": "coco", "captions": str(captions), "images": images}


@dataclass(frozen=True)
class Unit:
    """A part of the pairs.

    Attributes:
        number: its place among all units.
        name: of its files.
        count: how many images it has; None: a tar that was not read yet.
        part: what it is: a range of the index, or a tar's address.
    """

    number: int
    name: str
    count: int | None
    part: ImageRange | str


def source_texts(spec: dict[str, Any]) -> Iterator[str]:
    """Yields the captions of a source, see `cleaned`; empty ones are left out, and images are not read.

    Args:
        spec: the source's name and options.

    Raises:
        InputError: the source cannot be read, or has no captions.
    """
    if spec["name"] == WEBDATASET:
        options = {key: value for key, value in spec.items() if key != "name"}
        config = check(WebdatasetConfig, options, "source")
        records = (
            one for tar in addresses(config.shards) for one in stream_records(tar, config, images=False)
        )
        found = (text for record in records for text in record.captions)
    else:
        source: Source = build_plugin(SOURCES, spec)
        pairs = source.pairs()
        found = (text for number in range(len(pairs)) for text in _captions_at(pairs, number))
    any_text = False
    for text in map(cleaned, found):
        if text:
            any_text = True
            yield text
    if not any_text:
        raise InputError(f"the source {spec['name']} has no captions; check its options")


def _captions_at(pairs: Pairs, number: int) -> tuple[str, ...]:
    try:
        return pairs[number].captions
    except InputError:  # an image without a text beside it; mining lists it
        return ()


class PairReader(Protocol):
    """Reads pairs unit by unit; made in each process."""

    def units(self) -> list[Unit]:
        """Returns all units, in order."""

    def read(self, unit: Unit) -> Iterator[CaptionedImageEntry]:
        """Yields the images of a unit, in order; those that cannot be used say so."""


class TarReader:
    """Reads tars of webdataset's form.

    Args:
        config: which tars, and which of their members are images and captions.
    """

    def __init__(self, config: WebdatasetConfig) -> None:
        self.config, self.tars = config, addresses(config.shards)
        self.names = unique_stems(self.tars)

    def units(self) -> list[Unit]:
        """Returns one unit per tar, named after it."""
        parts = enumerate(zip(self.names, self.tars, strict=True))
        return [Unit(number, name, None, tar) for number, (name, tar) in parts]

    def read(self, unit: Unit) -> Iterator[CaptionedImageEntry]:
        """Yields the images of a tar with their encoded bytes."""
        tar = str(unit.part)
        for record in stream_records(tar, self.config):
            image_id = unit.number * _PER_TAR + record.number + 1
            image = record.image
            name = image.name if image is not None else record.key
            yield CaptionedImageEntry(
                image_id,
                name,
                tuple(map(storable, record.captions)),
                key=record.key,
                tar=tar,
                place=None if image is None else (image.offset, image.size),
                fault=record.fault,
                data=None if image is None else image.data,
            )


class IndexReader:
    """Reads ranges of an index of images, see `write_index`.

    Args:
        path: the index.
        size: images per unit.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.index, self.size = CaptionIndex(path), size

    def units(self) -> list[Unit]:
        """Returns one unit for each `size` images that follow each other."""
        return [
            Unit(part.number, f"shard-{part.number:05d}", part.count, part)
            for part in self.index.slices(self.size)
        ]

    def read(self, unit: Unit) -> Iterator[CaptionedImageEntry]:
        """Yields the images of a range in the order of their ids."""
        assert isinstance(unit.part, ImageRange)
        yield from self.index.read(unit.part)


def write_index(spec: dict[str, Any], path: Path) -> None:
    """Writes the index of a source's images, but of webdataset tars, which need none.

    Args:
        spec: the source's name and options.
        path: the SQLite file.

    Raises:
        InputError: the source cannot be read, or its images are inside its tables.
    """
    if spec["name"] == "coco":
        root = ImageRoot(spec["images"])
        write_caption_index(spec["captions"], path, None if root.tars else root.folder)
        return
    source: Source = build_plugin(SOURCES, spec)
    write_pair_index(_entries(source.pairs(), source_root(spec)), path)


def pair_reader(spec: dict[str, Any], index: Path, unit_images: int) -> PairReader:
    """Returns the reader of a source; of all but tars, `index` must have been written, see `write_index`."""
    if spec["name"] == WEBDATASET:
        options = {key: value for key, value in spec.items() if key != "name"}
        return TarReader(check(WebdatasetConfig, options, "source"))
    return IndexReader(index, unit_images)


def _entries(pairs: Pairs, root: str) -> Iterator[CaptionedImageEntry]:
    for number in range(1, len(pairs) + 1):
        try:
            pair = pairs[number - 1]
        except InputError as error:  # an image without a text beside it
            yield CaptionedImageEntry(number, f"pair {number}", (), fault=str(error), key=str(number))
            continue
        yield _entry(number, pair.image, pair.captions, root)


def _entry(number: int, image: Stored, captions: Sequence[str], root: str) -> CaptionedImageEntry:
    if isinstance(image, Path):
        inside = root and image.is_relative_to(root)
        name = (image.relative_to(root) if inside else image.absolute()).as_posix()
        return CaptionedImageEntry(number, name, tuple(captions), key=name)
    if isinstance(image, Member):
        tar, name = str(image.tar), str(image).removeprefix(f"{image.tar}/")
        place = (image.offset, image.size)
        return CaptionedImageEntry(number, name, tuple(captions), key=name, tar=tar, place=place)
    raise InputError(
        f"image {image} is inside a table: the region stages read images as files or in tars; write them as "
        "webdataset tars, or as files whose paths the table has"
    )
