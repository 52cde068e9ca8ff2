"""Lookup of images by file name, with any part of the path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath

from clip_base.runtime.errors import InputError, note


class FileNames:
    """Finds the image that a path means.

    Two paths mean the same image when one is the end of the other: `photos/val/7.jpg`, `val/7.jpg` and
    `7.jpg`. Of several such images the one that shares the longest end is meant.

    Args:
        names: file name of each image, by id. Several ids may have one name.
        where: where the names stand, for messages.
    """

    def __init__(self, names: Mapping[int, str], where: str) -> None:
        self.where = where
        self._asked: dict[int, str] = {}
        self._by_end: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        for image_id, name in names.items():
            parts = _parts(name)
            self._by_end.setdefault(parts[-1], []).append((parts, image_id))

    def find(self, name: str) -> int | None:
        """Returns the id of the image that `name` means; None: there is none.

        Raises:
            InputError: `name` means several images equally well, or the same one as another name that was
                asked for.
        """
        image_id = self._find(name)
        if image_id is not None and self._asked.setdefault(image_id, name) != name:
            raise InputError(
                f"{self._asked[image_id]} and {name} both mean the image with id {image_id} of {self.where}; "
                "write its file_name with the folder that distinguishes them"
            )
        return image_id

    def _find(self, name: str) -> int | None:
        wanted = _parts(name)
        candidates = [
            (_shared(parts, wanted), parts, image_id)
            for parts, image_id in self._by_end.get(wanted[-1], ())
            if _shared(parts, wanted) == min(len(parts), len(wanted))
        ]
        if not candidates:
            return None
        longest = max(shared for shared, _, _ in candidates)
        best = [(parts, image_id) for shared, parts, image_id in candidates if shared == longest]
        exact = [(parts, image_id) for parts, image_id in best if parts == wanted]
        best = exact or best
        if len(best) > 1:
            shown = ", ".join(f"{'/'.join(parts)} (id {image_id})" for parts, image_id in best[:2])
            raise InputError(
                f"file_name {name!r} means several images of {self.where}: {shown}; write enough of the "
                "path to distinguish them"
            )
        return best[0][1]


def name_images(names: dict[int, str], pairs: Iterable[tuple[int, str]], where: str) -> None:
    """Adds (image id, file name) of a file's entries to `names`.

    Raises:
        InputError: an id belongs to two images.
    """
    for image_id, name in pairs:
        if names.setdefault(image_id, name) != name:
            raise InputError(
                f"{where}: image_id {image_id} is used for both {names[image_id]} and {name}; give every "
                "image its own id, or leave file_name out"
            )


def ids_by_name(own: Mapping[int, str], images: Mapping[int, str], source: str, where: str) -> dict[int, int]:
    """Returns for each image of one file the id that another file has for its file name.

    Numbers alone say nothing: two files may number the same images otherwise. That some of them have another
    id, or are not there, is noted.

    Args:
        own: file name of each image, by id.
        images: the same of the other file.
        source: what the first file is, for messages.
        where: what the other one is.

    Returns:
        The other file's id, by id; images that it does not have are left out.

    Raises:
        InputError: it has none of them, or a name means several of its images.
    """
    known = FileNames(images, where)
    found = {image_id: known.find(name) for image_id, name in own.items()}
    there = {image_id: other for image_id, other in found.items() if other is not None}
    if own and not there:
        raise InputError(
            f"{where} has none of the {len(own):,} images of {source}, such as {next(iter(own.values()))}; "
            "give the file of the same images"
        )
    if len(there) < len(own):
        absent = next(name for image_id, name in own.items() if image_id not in there)
        note(
            f"{len(own) - len(there):,} of {len(own):,} images of {source} are not in {where}, such as "
            f"{absent}"
        )
    moved = sum(image_id != other for image_id, other in there.items())
    if moved:
        note(
            f"images are found by file_name: {moved:,} of {len(own):,} images of {source} have another id in "
            f"{where}"
        )
    return there


def _parts(name: str) -> tuple[str, ...]:
    """Returns the folders and the name of a path, without root and without `.`; Windows' paths too."""
    parts = [part for part in PurePath(name.replace("\\", "/")).parts if part not in ("/", "//")]
    return tuple(parts) or ("",)


def _shared(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Returns how many parts at the end are the same."""
    count = 0
    for mine, theirs in zip(reversed(one), reversed(other), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
