"""An index of images and their captions on disk, by image id, of which any part can be read."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_base.data.coco import CAPTIONS, caption_of, checked_entry, file_name_of, two_images, unlisted
from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import Progress
from clip_base.storage.files import naming_full_disk, replacing
from clip_base.storage.json_stream import stream_entries
from clip_base.storage.paths import image_in
from regionclip.data.captions import storable

_AT_ONCE = 10_000  # rows written at once
_INSERT = "INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True)
class ImageRange:
    """Images that follow each other in the order of ids.

    Attributes:
        number: of the slice.
        first: the first image's id.
        last: the last image's id.
        count: how many images there are.
    """

    number: int
    first: int
    last: int
    count: int


@dataclass(frozen=True)
class CaptionedImageEntry:
    """An image of the list.

    Attributes:
        image_id: its id in COCO's captions file, else its number in the source.
        file_name: relative to the folder of images, or its name in the tar.
        captions: in the source's order, white space as single spaces; empty ones left out.
        size: (height, width) in pixels as the captions file states them; None: it does not.
        key: what identifies it in its source: COCO's id, the file's name, or a tar's `__key__`.
        tar: the tar that it is in; "": none.
        place: offset and size in bytes in that (uncompressed) tar; None: it is in none.
        fault: why it cannot be used; "" for one that can.
        data: the encoded image, where it was read already.
    """

    image_id: int
    file_name: str
    captions: tuple[str, ...]
    size: tuple[int, int] | None = None
    key: str = ""
    tar: str = ""
    place: tuple[int, int] | None = None
    fault: str = ""
    data: bytes | None = None


def write_caption_index(captions: str | Path, path: Path, images: Path | None = None) -> None:
    """Writes the images of a captions file in COCO's format as an SQLite file, atomically.

    The file is read entry by entry, so that memory does not grow with it.

    Raises:
        InputError: the file is missing or malformed, a caption's image is not listed in it, or an image's
            name leads out of `images`, the folder that names are relative to.
    """
    with _writing(path) as base:
        _fill(base, captions, images)
        base.execute("CREATE INDEX by_image ON captions (image_id)")
        _require_listed(base, captions)


def write_pair_index(entries: Iterable[CaptionedImageEntry], path: Path) -> None:
    """Writes the images of any source as an SQLite file, atomically; they are read one by one."""
    with _writing(path) as base, Progress("reading captions") as progress:
        for entry in entries:
            height, width = entry.size or (None, None)
            offset, size = entry.place or (None, None)
            names = (entry.key, entry.tar, offset, size, entry.fault)
            base.execute(_INSERT, (entry.image_id, entry.file_name, height, width, *names))
            rows = ((entry.image_id, storable(text)) for text in entry.captions)
            base.executemany("INSERT INTO captions VALUES (?, ?)", rows)
            progress.advance()
        base.execute("CREATE INDEX by_image ON captions (image_id)")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[sqlite3.Connection]:
    with replacing(path) as temporary, naming_full_disk(path, sqlite3.OperationalError):
        temporary.unlink(missing_ok=True)  # of a killed process that had this one's number
        base = sqlite3.connect(temporary)
        try:
            # What is half written is thrown away, so nothing needs to be undone after a kill.
            base.execute("PRAGMA journal_mode = OFF")
            base.execute(
                "CREATE TABLE images (id INTEGER PRIMARY KEY, file_name TEXT, height INT, width INT, "
                "key TEXT, tar TEXT, offset INT, size INT, fault TEXT)"
            )
            base.execute("CREATE TABLE captions (image_id INTEGER, text TEXT)")
            yield base
            base.commit()
        finally:
            base.close()


def _fill(base: sqlite3.Connection, captions: str | Path, folder: Path | None) -> None:
    images, texts, seen = list[tuple[Any, ...]](), list[tuple[int, str]](), Counter[str]()
    file = f"captions file {captions}"

    def flush() -> None:
        base.executemany(_INSERT, images)
        for key, name, *_ in images:
            (first,) = base.execute("SELECT file_name FROM images WHERE id = ?", (key,)).fetchone()
            if name != first:
                raise two_images(file, key, first, name)
        base.executemany("INSERT INTO captions VALUES (?, ?)", texts)
        images.clear()
        texts.clear()

    with Progress("reading captions") as progress:
        for key, entry in stream_entries(captions, "captions file"):
            where = f"{file}: {key}[{seen[key]}]"
            seen[key] += 1
            if key in CAPTIONS:
                entry = checked_entry(entry, where, CAPTIONS[key])
            if key == "images":
                number, name = entry["id"], file_name_of(entry, where)
                if folder is not None:
                    image_in(folder, name, where)  # refused before the first image is read
                images.append((number, name, *_size_of(entry), str(number), "", None, None, ""))
            elif key == "annotations":
                texts.append((entry["image_id"], storable(caption_of(entry, where))))
                progress.advance()
            if len(images) + len(texts) >= _AT_ONCE:
                flush()
        flush()
    if "images" not in seen:
        raise InputError(
            f"{file} is not in COCO's format, or lists no image: it must have 'images' and 'annotations' at "
            "the top level"
        )


def _size_of(entry: dict[str, Any]) -> tuple[int | None, int | None]:
    """Returns the height and width that an entry states; None where they are no sides of an image."""
    height, width = entry.get("height"), entry.get("width")
    if not all(isinstance(side, int | float) and 1 <= side < 2**31 for side in (height, width)):
        return None, None
    return int(height or 0), int(width or 0)


def _require_listed(base: sqlite3.Connection, captions: str | Path) -> None:
    (strangers, one) = base.execute(
        "SELECT COUNT(DISTINCT image_id), MIN(image_id) FROM captions "
        "WHERE text != '' AND image_id NOT IN (SELECT id FROM images)"
    ).fetchone()
    if strangers:
        raise unlisted(f"captions file {captions}", strangers, one)


class CaptionIndex:
    """Reads what `write_caption_index` wrote; any number of processes may, nothing is locked.

    Raises:
        InputError: from each method, when the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._base = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)

    def _select(self, query: str, values: Sequence[int] = ()) -> Iterator[Any]:
        try:
            yield from self._base.execute(f"SELECT {query}", values)
        except (sqlite3.DatabaseError, ValueError, OverflowError) as error:
            raise InputError(f"list of images {self._path} is damaged ({error}); delete it") from None

    def __len__(self) -> int:
        """Returns how many images there are."""
        ((count,),) = self._select("COUNT(*) FROM images")
        return int(count)

    def slices(self, size: int) -> Iterator[ImageRange]:
        """Yields all images in slices of `size`; the last one may have fewer."""
        ids = (key for (key,) in self._select("id FROM images ORDER BY id"))
        number, first, last, count = 0, 0, 0, 0
        for last in ids:
            first, count = last if not count else first, count + 1
            if count == size:
                yield ImageRange(number, first, last, count)
                number, count = number + 1, 0
        if count:
            yield ImageRange(number, first, last, count)

    def read(self, part: ImageRange) -> list[CaptionedImageEntry]:
        """Returns the images of a slice, in the order of their ids."""
        span = (part.first, part.last)
        texts: dict[int, list[str]] = {}
        order = "image_id, text FROM captions WHERE image_id BETWEEN ? AND ? ORDER BY image_id, rowid"
        for key, text in self._select(order, span):
            if text:
                texts.setdefault(key, []).append(text)
        rows = self._select(
            "id, file_name, height, width, key, tar, offset, size, fault FROM images "
            "WHERE id BETWEEN ? AND ? ORDER BY id",
            span,
        )
        return [
            CaptionedImageEntry(
                number,
                name,
                tuple(texts.get(number, ())),
                (height, width) if height and width else None,
                key,
                tar,
                None if offset is None else (offset, size),
                fault,
            )
            for number, name, height, width, key, tar, offset, size, fault in rows
        ]
