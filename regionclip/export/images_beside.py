"""The images of a dataset beside its labels, where the programs that read it look for them."""

from __future__ import annotations

from pathlib import Path

from clip_base.images.decode import read_bytes
from clip_base.images.roots import ImageRoot
from clip_base.runtime.errors import InputError
from clip_base.storage.files import make_folder, replacing
from clip_base.storage.paths import leads_out
from clip_base.storage.tars import tar_of


class ImagesBeside:
    """A link to the folder of the images; or, as tars cannot be linked to, copies of the images in them.

    Args:
        place: the link, or the folder of copies.
        images: what the images' file names are relative to: a folder, or tars.

    Raises:
        InputError: there is no such folder, or no such tar.
    """

    def __init__(self, place: Path, images: str) -> None:
        self.place = place
        # A folder in a tar is no folder of the system's.
        self._inside_tar = Path(images) if tar_of(Path(images)) is not None else None
        self._root = None if self._inside_tar else ImageRoot(images)
        self._linked = False

    def add(self, file_name: str) -> None:
        """Makes the link at the first image that is a file, or the copy of one in a tar.

        Raises:
            InputError: the name leads out of the folder, or the tar has no such image.
        """
        if self._linked:
            return
        source = self._root.path(file_name) if self._root else (self._inside_tar or Path()) / file_name
        if tar_of(source) is None and self._root and not self.place.is_dir():
            make_folder(self.place.parent)
            self.place.symlink_to(self._root.folder.absolute(), target_is_directory=True)
        self._linked = self.place.is_symlink()
        if not self._linked:
            copy = inside(self.place, Path(file_name))
            with replacing(copy) as temporary:
                temporary.write_bytes(read_bytes(source))


def inside(folder: Path, name: Path) -> Path:
    """Returns the file `name` in a folder.

    Raises:
        InputError: the name, which comes from data, leads out of the folder.
    """
    if leads_out(str(name)):
        raise InputError(f"file name {str(name)!r} leads out of {folder.name}/; nothing was written there")
    return folder / name
