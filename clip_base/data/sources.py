"""Sources of image-text pairs. A source is a plugin: a class with one config and `pairs()`."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clip_base.data.coco import read_captions
from clip_base.images.decode import Stored
from clip_base.images.roots import ImageRoot
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError, note, quote, shortened
from clip_base.storage.files import ENCODING_HELP, read_json_lines
from clip_base.storage.paths import image_in
from clip_base.storage.tables import DELIMITER_HELP, open_table
from clip_base.storage.tars import names_tars

SOURCES = "clip_base.sources"
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "file", "path", "key")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence")
_FIRST = "empty: the first of {} that it has"
IMAGE_COLUMN_HELP = f"column of the image path; {_FIRST.format(', '.join(IMAGE_COLUMNS))}"
CAPTION_COLUMN_HELP = f"column of the caption; {_FIRST.format(', '.join(CAPTION_COLUMNS))}"
SPLIT_LINES_HELP = "whether each line of a text is a caption of its own; false: all of it is one"


@dataclass(frozen=True)
class Pair:
    """An image and what was written about it (at least one caption).

    Attributes:
        image: a path, or what else holds an encoded image.
        captions: texts, white space made single spaces.
    """

    image: Stored
    captions: tuple[str, ...]


class Pairs(Protocol):
    """Pairs by number. A list is one; others read a pair when it is drawn."""

    def __len__(self) -> int:
        """The number of pairs."""

    def __getitem__(self, index: int, /) -> Pair:
        """Returns pair `index`. One that cannot be used raises InputError, and the Loader skips it."""


class Source(Protocol):
    """A part that knows image-text pairs."""

    def pairs(self) -> Pairs:
        """Returns all pairs. Images are not opened: one that does not decode is skipped when it is drawn."""


@dataclass
class CocoCaptionsConfig:
    """Captions in COCO's format."""

    captions: str = option(REQUIRED, "captions_*.json in COCO's format")
    images: str = option(REQUIRED, "folder that the file names in it are relative to")


class CocoCaptionsSource:
    """COCO's captions JSON: several captions per image; images without a caption are left out."""

    def __init__(self, config: CocoCaptionsConfig) -> None:
        self.config = config

    def pairs(self) -> list[Pair]:
        """Returns one pair an image."""
        root = ImageRoot(self.config.images)
        captions, names = read_captions(self.config.captions)
        where = f"captions file {self.config.captions}"
        return [Pair(root.path(names[key], where), tuple(texts)) for key, texts in captions.items()]


@dataclass
class TableConfig:
    """A table with one image and one caption a row."""

    file: str = option(REQUIRED, "CSV or TSV file whose first line has the column names")
    images: str = option("", "folder that the image paths are relative to; empty: the table's own")
    image_column: str = option("", IMAGE_COLUMN_HELP)
    caption_column: str = option("", CAPTION_COLUMN_HELP)
    delimiter: str = option("", DELIMITER_HELP)
    encoding: str = option("", ENCODING_HELP)


class TableSource:
    """CSV or TSV, see `open_table`: rows of the same image are its several captions."""

    def __init__(self, config: TableConfig) -> None:
        self.config = config

    def pairs(self) -> list[Pair]:
        """Returns one pair an image, in the order of first mention."""
        config, path = self.config, Path(self.config.file)
        wanted = columns_wanted(config.image_column, config.caption_column)
        table = open_table(path, "table", wanted, config.delimiter, config.encoding)
        places = [table.index(name) for name in columns_in(table.columns, wanted, f"table {path}")]
        rows = [(row[places[0]], row[places[1]]) for _, row in itertools.islice(table.rows(), 1, None)]
        return grouped(rows, config.images, path.parent, f"table {path}")


@dataclass
class JsonLinesConfig:
    """A record a line."""

    file: str = option(REQUIRED, "JSON Lines file")
    images: str = option("", "folder that the image paths are relative to; empty: the file's own")
    image_key: str = option("", IMAGE_COLUMN_HELP.replace("column", "key"))
    caption_key: str = option(
        "", CAPTION_COLUMN_HELP.replace("column", "key") + "; a text or a list of texts"
    )
    encoding: str = option("", ENCODING_HELP)


class JsonLinesSource:
    """JSON Lines: an object a line, with an image path and one or several captions."""

    def __init__(self, config: JsonLinesConfig) -> None:
        self.config = config

    def pairs(self) -> list[Pair]:
        """Returns one pair an image, in the order of first mention."""
        path, config = Path(self.config.file), self.config
        rows: list[tuple[str, str]] = []
        wanted = columns_wanted(config.image_key, config.caption_key)
        image_key = caption_key = ""
        for number, record in read_json_lines(path, "JSON Lines file", config.encoding):
            if not image_key and isinstance(record, dict):
                where = f"JSON Lines file {path}, line {number}"
                image_key, caption_key = columns_in(list(record), wanted, where, "key")
            try:
                image, texts = record[image_key], record[caption_key]
                texts = texts if isinstance(texts, list) else [texts]
                if not all(isinstance(text, str) for text in [image, *texts]):
                    raise TypeError
            except (KeyError, TypeError, IndexError):
                raise InputError(
                    f"JSON Lines file {path}, line {number}: each line needs {image_key!r}, a path, "
                    f"and {caption_key!r}, a text or a list of texts; found {quote(record)}; "
                    "set source.image_key= and source.caption_key="
                ) from None
            rows += [(image, text) for text in texts]
        return grouped(rows, config.images, path.parent, f"JSON Lines file {path}")


def columns_wanted(image: str, caption: str) -> list[tuple[str, ...]]:
    """Returns the names that the columns of images and captions may have; "" stands for the usual ones."""
    return [(image,) if image else IMAGE_COLUMNS, (caption,) if caption else CAPTION_COLUMNS]


def columns_in(
    names: Sequence[str], wanted: Sequence[tuple[str, ...]], where: str, kind: str = "column"
) -> tuple[str, str]:
    """Returns the first of the wanted names that is there, for the images and for the captions.

    Args:
        names: of a table's columns, or of a record's keys.
        wanted: see `columns_wanted`.
        where: the file, for messages.
        kind: what the names are of: "column" or "key".

    Raises:
        InputError: there is none of them.
    """
    found = [next((name for name in usual if name in names), "") for usual in wanted]
    if not all(found):
        lacking = wanted[found.index("")]
        told = repr(lacking[0]) + (f" (or {', '.join(lacking[1:])})" if len(lacking) > 1 else "")
        raise InputError(
            f"{where} has no {kind} {told}; it has {shortened(', '.join(names))}; "
            f"set source.image_{kind}= and source.caption_{kind}="
        )
    return found[0], found[1]


def captions_in(text: str, split_lines: bool) -> tuple[str, ...]:
    """Returns the captions in one image's text: each line that is not empty, or all as one."""
    lines = text.splitlines() if split_lines else [text]
    return tuple(" ".join(line.split()) for line in lines if line.strip())


def grouped(rows: list[tuple[str, str]], images: str, beside: Path, where: str) -> list[Pair]:
    """Returns one pair per image of (image path, caption) rows; notes how many lack one and are left out.

    Args:
        rows: as they stand in a table.
        images: the folder that the paths are relative to and lead out of only where that is allowed; "": the
            user gave none, and paths may lead anywhere.
        beside: what the paths are relative to in that case: the table's folder.
        where: the table, for the note.

    Raises:
        InputError: a path leads out of `images`.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    left_out = 0
    for image, text in rows:
        text = " ".join(text.split())
        if image and text:
            captions[image].append(text)
        else:
            left_out += 1
    if left_out:
        note(f"{where}: {left_out:,} of {len(rows):,} rows lack an image or a caption and are left out")
    if not images:
        return [Pair(beside / image, tuple(texts)) for image, texts in captions.items()]
    folder = Path(images)
    root = ImageRoot(folder) if names_tars(str(folder)) else None
    return [
        Pair(root.path(image, where) if root else image_in(folder, image, where), tuple(texts))
        for image, texts in captions.items()
    ]
