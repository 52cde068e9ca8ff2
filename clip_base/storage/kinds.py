"""What a file is by its first bytes, so that an error names it: a wrong file is no damaged one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

HEAD = 1 << 16  # bytes that are looked at
JSON, JSON_LINES, EMPTY = "JSON", "JSON Lines (one object per line)", "an empty file"
_MARKS = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG\r\n": "a PNG image",
    b"GIF8": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"BM": "a BMP image",
    b"%PDF": "a PDF document",
    b"PAR1": "a Parquet table",
    b"SQLite format 3\0": "an SQLite database",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x7fELF": "a program",
    b"version https://git-lfs": "a placeholder of Git LFS, not the file itself: run `git lfs pull`",
}


def kind_of(path: str | Path) -> str:
    """Returns what a file is, with its article: "a CSV table", `JSON`; "" when that cannot be told."""
    try:
        with Path(path).open("rb") as file:
            return kind_of_bytes(file.read(HEAD))
    except OSError:
        return ""


def kind_of_bytes(head: bytes) -> str:
    """Returns what a file is that begins with these bytes, see `kind_of`."""
    if not head:
        return EMPTY
    marked = next((kind for mark, kind in _MARKS.items() if head.startswith(mark)), "")
    if marked == "a BMP image" and head[6:10] != b"\0\0\0\0":  # a text may begin so
        marked = ""
    return marked or _packed(head) or _text(head)


def _packed(head: bytes) -> str:
    """Returns which of the formats whose mark stands elsewhere, or says little, the bytes begin."""
    if head.startswith(b"PK\x03\x04"):
        inside = head[:4096]
        if b"data.pkl" in inside or b"/version" in inside:
            return "a PyTorch file"
        return "an Office document" if b"[Content_Types]" in inside else "a zip archive"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle"
    if head[:4] == b"RIFF":
        return {b"WEBP": "a WebP image", b"AVI ": "a video"}.get(head[8:12], "")
    if head[4:8] == b"ftyp":
        return "an AVIF or HEIC image" if head[8:12] in (b"avif", b"heic", b"mif1") else "a video"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "a video"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[8:10] == b'{"' and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return "a safetensors file"
    return ""


def _text(head: bytes) -> str:
    """Returns what kind of text the bytes begin; "" for none that is known."""
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < HEAD else "ignore").lstrip()
    except UnicodeDecodeError:
        return ""
    if not text:
        return EMPTY
    lines = [line for line in text.splitlines() if line.strip()]
    if "\0" in text:
        return ""
    if text[0] in "[{":
        return JSON_LINES if len(lines) > 1 and all(map(_is_object, lines[:2])) else JSON
    if text[0] == "<":
        return (
            "an HTML page"
            if "<html" in text[:2000].lower() or "<!doctype html" in text[:200].lower()
            else "XML"
        )
    rows = list(csv.reader(lines[:5]))
    for name, separator in (("a CSV table", ","), ("a TSV table", "\t"), ("a CSV table", ";")):
        columns = {len(next(csv.reader([line], delimiter=separator))) for line in lines[:5]}
        if len(rows) > 1 and len(columns) == 1 and columns != {1}:
            return name
    if len(lines) > 1 and all(_is_box(line) for line in lines[:5]):
        return "a list of numbers, as YOLO's labels are"
    return ""


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_box(line: str) -> bool:
    try:
        return len([float(word) for word in line.split()]) >= 5
    except ValueError:
        return False


def instead(head: bytes, *expected: str) -> str:
    """Returns `; it is KIND` for bytes of another kind than those expected; else ""."""
    kind = kind_of_bytes(head)
    return "" if not kind or kind in expected else f"; it is {kind}"
