"""Captions without images, from JSON, JSON Lines, CSV, TSV or text files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]

from clip_base.data.sources import CAPTION_COLUMNS
from clip_base.models.tokenizer import clean
from clip_base.runtime.errors import InputError, quote, shortened
from clip_base.storage.files import existing, open_text, read_json_lines
from clip_base.storage.json_stream import stream_entries
from clip_base.storage.tables import open_table

_MARKUP = re.compile("[&<]")
_HALF = re.compile("[\ud800-\udfff]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Emoji with modifiers and joiners, symbols, half characters (U+FFFD by now); the zero-width space.
_SYMBOL = regex.compile(r"(?:[\p{So}\p{Emoji_Modifier}\ufe0e\ufe0f\u20e3]\u200d?)+|\u200b")
_INVISIBLE = regex.compile(r"[\p{Cf}--[\u200c\u200d]]|(?<![^\x00-\x7f])[\u200c\u200d]+", regex.V1)


def read_texts(path: str | Path, column: str = "", encoding: str = "") -> Iterator[str]:
    """Yields the captions of a file, see `cleaned`; empty ones are left out.

    Args:
        path: COCO's captions JSON (or a JSON list of texts or objects); `.txt`, one per line; `.jsonl`;
            `.csv` and `.tsv`.
        column: the caption's column or key; "" looks for caption, text or title. For a table without a first
            line of names, its number from 0.
        encoding: of the file, unless it is COCO's JSON; "": UTF-8.

    Raises:
        InputError: a missing, empty or malformed file, or one without such a column.
    """
    path = existing(path, "captions file")
    kind = path.suffix.lower()
    if kind == ".json":
        texts = _from_json(path, column)
    elif kind in (".jsonl", ".ndjson"):
        texts = _from_json_lines(path, column, encoding)
    elif kind in (".csv", ".tsv", ".tab"):
        texts = _from_table(path, column, encoding)
    elif kind == ".txt":
        texts = _lines(path, encoding)
    else:
        raise InputError(
            f"captions file {path} is of an unknown kind; give .json, .jsonl, .csv, .tsv or .txt"
        )
    any_text = False
    for text in texts:
        clean = cleaned(text)
        if clean:
            any_text = True
            yield clean
    if not any_text:
        raise InputError(f"captions file {path} holds no captions; is it the right file?")


def cleaned(text: str) -> str:
    """Returns a caption as the phrase parser needs it: CLIP's cleaning, then without what names nothing.

    A parser takes HTML tags, emoji and invisible characters for words or for parts of words ("br", "dog" with
    a zero-width space). The joiners that Persian and Hindi spell with stay.
    """
    if text.isascii() and text.isprintable() and not _MARKUP.search(text):
        return " ".join(text.split())
    text = clean(text)
    for pattern, instead in ((_TAG, " "), (_SYMBOL, " "), (_INVISIBLE, "")):
        text = pattern.sub(instead, text)
    return " ".join(text.split())


def storable(text: str) -> str:
    """Returns a caption as files hold it: white space as single spaces, without half surrogate pairs."""
    return " ".join(_HALF.sub("", text).split())


def _lines(path: Path, encoding: str) -> Iterator[str]:
    with open_text(path, "captions file", encoding) as file:
        yield from file


def _from_json(path: Path, column: str) -> Iterator[str]:
    number = 0
    for key, entry in stream_entries(path, "captions file"):
        if key in ("annotations", ""):  # COCO's, or a list
            yield from _texts_of(entry, column, f"{path}, entry {number}")
            number += 1
    if not number:
        raise InputError(
            f"captions file {path} must have `annotations` as COCO's have, or be a list of captions"
        )


def _from_json_lines(path: Path, column: str, encoding: str) -> Iterator[str]:
    for number, entry in read_json_lines(path, "captions file", encoding):
        yield from _texts_of(entry, column, f"{path}, line {number}")


def _texts_of(entry: Any, column: str, where: str) -> list[str]:
    """Returns the captions of one JSON entry: a text, or an object with a text or a list of texts."""
    value = entry
    if isinstance(entry, dict):
        key = next((name for name in ((column,) if column else CAPTION_COLUMNS) if name in entry), None)
        if key is None:
            found = shortened(", ".join(entry))
            raise InputError(f"captions file {where}: no {column or 'caption'!r} among {found}; set column=")
        value = entry[key]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"captions file {where}: the caption must be text, found {str(value)[:60]!r}")
    return texts


def _from_table(path: Path, column: str, encoding: str) -> Iterator[str]:
    wanted = (column,) if column else CAPTION_COLUMNS
    by_number = column.isdecimal()
    table = open_table(path, "captions file", [] if by_number else [wanted], encoding=encoding)
    index = int(column) if by_number else next((i for i in map(table.index, wanted) if i >= 0), -1)
    if not 0 <= index < len(table.columns):
        raise InputError(
            f"captions file {path} has no column {wanted[0]!r}, its first line is {quote(table.columns)}; "
            "set column= to a name there, or to a number from 0 if it has no header line"
        )
    for _, row in itertools.islice(table.rows(), 0 if by_number else 1, None):
        yield row[index]
