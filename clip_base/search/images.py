"""The images that some places stand for: files, folders, patterns, and members of tars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_base.images.folders import IMAGE_SUFFIXES, list_images
from clip_base.images.inputs import image_files
from clip_base.runtime.errors import InputError, note
from clip_base.storage.tars import Member, scan

TAR = ".tar"


@dataclass(frozen=True)
class FoundImage:
    """An image.

    Attributes:
        key: its path, or `TAR/MEMBER`.
        stamp: changes when its file does.
        place: where its bytes are.
    """

    key: str
    stamp: str
    place: Path | Member


def images_of(places: Sequence[str]) -> list[FoundImage]:
    """Returns the images of files, folders with all below them, patterns and uncompressed tars, each once.

    Raises:
        InputError: a place does not exist or holds no image.
    """
    found: dict[str, FoundImage] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            listed: Iterator[FoundImage] = map(_of_file, list_images(path))
        elif path.suffix.lower() == TAR and path.is_file():
            listed = members_of(path)
        else:
            files = image_files([place], IMAGE_SUFFIXES | {TAR})
            tars = [file for file in files if file.suffix.lower() == TAR]
            listed = (image for tar in tars for image in members_of(tar))
            found |= {str(file): _of_file(file) for file in files if file not in tars}
        found |= {image.key: image for image in listed}
    if not found:
        raise InputError(f"there is no image in {', '.join(places)}")
    return list(found.values())


def _of_file(file: Path) -> FoundImage:
    try:
        status = file.stat()
    except OSError:  # a link that leads nowhere is told when it is read
        return FoundImage(str(file), "", file)
    return FoundImage(str(file), f"{status.st_size} {status.st_mtime_ns}", file)


def members_of(tar: Path) -> Iterator[FoundImage]:
    """Yields the images in a tar."""
    index, status = scan(tar), tar.stat()
    if index.damage:
        note(index.damage)
    for name, offset, size in zip(index.names, index.offsets.tolist(), index.sizes.tolist(), strict=True):
        if Path(name).suffix.lower() in IMAGE_SUFFIXES:
            stamp = f"{status.st_size} {status.st_mtime_ns} {offset}"
            yield FoundImage(f"{tar}/{name}", stamp, Member(tar, offset, size))


def places_of(keys: Sequence[str]) -> dict[str, Path | Member]:
    """Returns where the images of some keys are; the headers of each tar among them are read once.

    Raises:
        InputError: one is in a tar that has no such member any more.
    """
    in_tars: dict[Path, dict[str, Path | Member]] = {}
    places: dict[str, Path | Member] = {}
    for key in keys:
        path = Path(key)
        tar = next((one for one in path.parents if one.suffix.lower() == TAR and one.is_file()), None)
        if tar is not None and tar not in in_tars:
            in_tars[tar] = {image.key: image.place for image in members_of(tar)}
        if tar is not None and key not in in_tars[tar]:
            raise InputError(f"{key} is no longer in its tar; index again")
        places[key] = path if tar is None else in_tars[tar][key]
    return places
