"""Listing of image files in a folder, with one rule for all jobs; ignored files are counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from clip_base.runtime.errors import InputError, note, quote
from clip_base.storage.files import existing

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
)
# What operating systems and programs leave in folders of images.
_SYSTEM = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__")
)
# Extensions of files that often accompany images; they are ignored without a note.
_COMPANIONS = frozenset(
    [
        ".txt",
        ".caption",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".xml",
        ".yaml",
        ".yml",
        ".md",
        ".html",
        ".parquet",
        ".tar",
        ".npy",
        ".npz",
        ".safetensors",
        ".db",
        ".log",
        ".py",
        ".sh",
        ".cls",
    ]
)


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        files: the files of the endings asked for, sorted by path.
        left_out: what is not among them, by what it is, and how often.
    """

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def told(self) -> str:
        """Returns what was left out, in words; "" for nothing."""
        return ", ".join(f"{count:,} {what}" for what, count in self.left_out.most_common())


def list_images(folder: str | Path, what: str = "images folder", recursive: bool = True) -> list[Path]:
    """Returns the images in a folder, sorted by path, and notes what it leaves out.

    Raises:
        InputError: there is no such folder, no image in it, or a link leads to a folder that it is in.
    """
    listing = list_files(folder, recursive=recursive, what=what)
    if not listing.files:
        raise none_found(f"{what} {folder}", IMAGE_SUFFIXES, listing)
    note_left_out(folder, listing)
    return listing.files


def note_left_out(folder: str | Path, listing: Listing) -> None:
    """Notes what a listing leaves out, if anything."""
    if listing.left_out:
        note(f"{folder}: {len(listing.files):,} files are read; {listing.told()} are ignored", stacklevel=4)


def none_found(where: str, suffixes: Collection[str], listing: Listing) -> InputError:
    """Returns the error of a folder that holds no file of the endings asked for."""
    instead = f"; there are {listing.told()}" if listing.left_out else ""
    return InputError(f"{where} holds no images ({', '.join(sorted(suffixes))}){instead}")


def list_files(
    folder: str | Path,
    suffixes: Collection[str] = IMAGE_SUFFIXES,
    recursive: bool = True,
    what: str = "images folder",
) -> Listing:
    """Lists the files of some endings in a folder.

    Links to files and folders are followed. Hidden files and folders, and those that systems leave
    (`__MACOSX`, `@eaDir`, …) are left out, as are files whose names are not UTF-8: no table or JSON file can
    hold those.

    Args:
        folder: where to look.
        suffixes: endings in lower case, their points included.
        recursive: whether to look into folders below.
        what: what the folder is to the user, for messages.

    Raises:
        InputError: there is no such folder, or a link in it leads to a folder that it is in.
    """
    root = existing(folder, what)
    if not root.is_dir():
        raise InputError(f"{what} {root} is not a folder")
    require_utf8(root, what)
    listing = Listing()
    _walk(root, suffixes, recursive, listing, ())
    listing.files.sort()
    return listing


def subfolders(folder: Path) -> list[Path]:
    """Returns the folders directly in a folder, sorted, of those that `list_files` looks into.

    Folders that are all numbered, as ImageNetV2's are, stand in the order of the numbers: in that of texts 10
    comes before 2, and names given for 0, 1, 2 … would be other classes'.
    """
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not _is_odd(path.name, True))
    if all(path.name.isdecimal() for path in found):
        return sorted(found, key=lambda path: int(path.name))
    return found


def require_utf8(path: Path, what: str) -> None:
    """Raises an InputError when a path is not UTF-8."""
    if not _is_utf8(str(path)):
        raise InputError(
            f"{what} {quote(path.name)} in {quote(str(path.parent))} has a name that is not UTF-8; rename it"
        )


def is_ordinary(path: Path) -> bool:
    """Whether a relative path is one that `list_files` may list: nothing hidden or of the system is in it."""
    *folders, name = path.parts
    return not _is_odd(name, False) and not any(_is_odd(folder, True) for folder in folders)


def fits(path: Path, pattern: Sequence[str]) -> bool:
    """Whether a path's parts fit a pattern's, of which `**` is any number of folders."""
    return _parts_fit(path.parts, pattern)


def _parts_fit(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _parts_fit(parts, pattern[1:]) or (bool(parts) and _parts_fit(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _parts_fit(parts[1:], pattern[1:])


def _walk(
    folder: Path,
    suffixes: Collection[str],
    recursive: bool,
    listing: Listing,
    above: tuple[tuple[int, int], ...],
) -> None:
    """Adds what a folder holds; `above` identifies the folders on the way to it."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise InputError(
            f"link {folder} leads to a folder that it is in ({folder.resolve()}); remove the link"
        )
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        listing.left_out["folders that may not be read"] += 1
        return
    for entry in entries:
        path = folder / entry.name
        is_folder = _is_folder(entry)
        suffix = path.suffix.lower()
        if not _is_utf8(entry.name):
            listing.left_out["with names that are not UTF-8 (rename them)"] += 1
        elif _is_odd(entry.name, is_folder):
            listing.left_out["hidden or of the system"] += 1
        elif is_folder and recursive:
            _walk(path, suffixes, recursive, listing, (*above, here))
        elif is_folder:
            listing.left_out["folders"] += 1
        elif suffix not in suffixes:
            if suffix not in _COMPANIONS:
                listing.left_out[f"with the ending {suffix}" if suffix else "without an ending"] += 1
        # A link that leads nowhere is an image that cannot be read, which is told as such.
        elif entry.is_symlink() or entry.is_file():
            listing.files.append(path)
        else:
            listing.left_out["pipes or devices"] += 1


def _is_odd(name: str, is_folder: bool) -> bool:
    return not _is_utf8(name) or name.startswith(".") or (is_folder and name.lower() in _SYSTEM)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
