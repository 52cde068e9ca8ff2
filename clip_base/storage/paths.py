"""Where file names in data lead: images stay in the folder that the user gave for them."""

from __future__ import annotations

from pathlib import Path, PurePath

from clip_base.runtime.errors import InputError, quote
from clip_base.storage.limits import OUTSIDE_IMAGES
from clip_base.storage.tars import tar_of


def image_in(folder: Path, name: str, where: str) -> Path:
    """Returns the image that a name in data means: `folder / name`.

    Links in the folder are followed: who made them decided so. A name may be absolute when it is in the
    folder.

    Args:
        folder: what the user gave for the images.
        name: from a file, which may come from anyone.
        where: names that file.

    Raises:
        InputError: the name leads out of the folder, and `--outside-images` is not given.
    """
    if name[:1] in "/\\" or ".." in name or ":" in name:  # all others are relative and go down
        path = PurePath(name)
        for base in (folder, folder.absolute()):
            if path.is_absolute() and path.is_relative_to(base):
                name = str(path.relative_to(base))
        if leads_out(name) and not OUTSIDE_IMAGES.value:
            raise InputError(
                f"{where}: the file name {quote(name)} leads out of the images folder {folder}; give the "
                f"folder that the names are in, or {OUTSIDE_IMAGES.option} if you trust them"
            )
    return folder / name


def name_in(folder: Path, path: Path) -> str:
    """Returns an image's name relative to its folder or tar; the whole path of one that is in neither."""
    root = folder if path.is_relative_to(folder) else tar_of(path)
    return str(path if root is None else path.relative_to(root))


def leads_out(name: str) -> bool:
    """Whether a name is not one of a file in a folder or below it: absolute, or with `..` in it."""
    path = PurePath(name)
    return bool(path.anchor) or ".." in path.parts
