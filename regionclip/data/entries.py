"""Images without boxes as a list of entries: those of a folder, of a pattern, or of image-text pairs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_base.data.inputs import WEBDATASET, source_root, told_apart
from clip_base.images.folders import IMAGE_SUFFIXES, list_files, none_found, note_left_out
from clip_base.images.headers import Embedded, Stored
from clip_base.images.inputs import image_files
from clip_base.images.roots import ImageRoot
from clip_base.runtime.errors import InputError
from clip_base.storage.paths import image_in
from clip_base.storage.tars import Member, addresses
from regionclip.data.batches import DecodedImage, read_annotated
from regionclip.data.caption_index import CaptionedImageEntry
from regionclip.data.pairs import pair_reader, write_index

_AT_ONCE = 2000  # entries of an index read at once


def entry_root(spec: dict[str, Any]) -> ImageRoot | None:
    """Returns what a source's file names are relative to; None: its images are in tars, or have full paths.

    Raises:
        InputError: the folder does not exist.
    """
    root = source_root(spec)
    return ImageRoot(root) if root and spec["name"] != WEBDATASET else None


def read_entry(entry: CaptionedImageEntry, root: ImageRoot | None) -> DecodedImage:
    """Reads an image of a list.

    Args:
        entry: the image.
        root: what its name is relative to; None: it has a full path.

    Raises:
        InputError: it cannot be used, or read; see `read_annotated`.
    """
    if entry.fault:
        raise InputError(entry.fault)
    stored: Path | Stored
    if entry.data is not None:
        stored = Embedded(entry.data, f"{entry.tar}/{entry.file_name}")
    elif entry.place is not None:
        stored = Member(Path(entry.tar), *entry.place)
    elif root is not None:
        stored = root.path(entry.file_name, "the captions")
    else:
        stored = image_in(Path("/"), entry.file_name, "the captions")
    return read_annotated(entry.image_id, stored, entry.size, entry.key)


def images_below(images: str) -> list[Path]:
    """Returns the images of a folder and those below, or of a pattern.

    Raises:
        InputError: there is no such place, or no image in it.
    """
    folder = Path(images)
    if not folder.is_dir():
        return image_files([images])
    listing = list_files(folder, IMAGE_SUFFIXES)
    if not listing.files:
        raise none_found(f"folder {folder}", IMAGE_SUFFIXES, listing)
    note_left_out(folder, listing)
    return listing.files


class ListedImages:
    """The images of a folder or of a pattern such as `photos/**/*.jpg`, numbered from 1.

    Attributes:
        total: how many there are.

    Raises:
        InputError: there is no such place, or no image in it.
    """

    def __init__(self, images: str) -> None:
        self._files = images_below(images)
        self.total = len(self._files)
        self._folder = Path(os.path.commonpath([file.absolute().parent for file in self._files]))
        self.root: ImageRoot | None = ImageRoot(self._folder)

    def __iter__(self) -> Iterator[CaptionedImageEntry]:
        for number, file in enumerate(self._files, 1):
            name = file.absolute().relative_to(self._folder).as_posix()
            yield CaptionedImageEntry(number, name, (), key=name)

    def name(self, entry: CaptionedImageEntry) -> str:
        """Returns the name by which the image is found again."""
        return entry.file_name


class SourceImages:
    """The images of image-text pairs, read one after another.

    Args:
        spec: the source's name and options.
        index: file for an index of them; tars need none.

    Attributes:
        total: how many there are; None: tars, which were not read yet.
    """

    def __init__(self, spec: dict[str, Any], index: Path) -> None:
        self.root = entry_root(spec)
        tars = addresses(spec["shards"]) if spec["name"] == WEBDATASET else []
        if not tars:
            write_index(spec, index)
        self._tar_names = dict(zip(tars, shortest(tars), strict=True))
        self._reader = pair_reader(spec, index, _AT_ONCE)
        self._units = self._reader.units()
        self.total = None if tars else sum(unit.count or 0 for unit in self._units)
        if not self._units:
            raise InputError(f"the source {spec['name']} has no image; check its options")

    def __iter__(self) -> Iterator[CaptionedImageEntry]:
        for unit in self._units:
            yield from self._reader.read(unit)

    def name(self, entry: CaptionedImageEntry) -> str:
        """Returns the name by which the image is found again: of one in a tar, with the tar's."""
        tar = self._tar_names.get(entry.tar, entry.tar)
        return f"{tar}/{entry.file_name}" if tar else entry.file_name


def shortest(paths: Sequence[str]) -> list[str]:
    """Returns the ends of paths, with as many folders as it takes to tell them apart."""
    return told_apart(paths, "/".join) or list(paths)
