"""What file names of images are relative to: a folder, or tars that are read without unpacking them."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

import numpy as np

from clip_base.runtime.errors import InputError
from clip_base.storage.files import existing
from clip_base.storage.paths import image_in
from clip_base.storage.tars import expand, name_hash, names_in, names_tars

IMAGES_HELP = "folder that the file names are relative to, or uncompressed tars: data/{0000..0009}.tar"


class ImageRoot:
    """A folder, or tars, in which images are found by name.

    An image in a tar has the path `TAR/NAME`, which every reader of images opens.

    Args:
        images: a folder; or tars, see `clip_base.storage.tars.addresses`.
        what: what it is to the user, for messages.

    Attributes:
        tars: the tars; empty for a folder.

    Raises:
        InputError: the folder or a tar does not exist, or a tar is compressed.
    """

    def __init__(self, images: str | Path, what: str = "images folder") -> None:
        self.images = str(images)
        self.tars = expand(self.images) if names_tars(self.images) else []
        self._listings: dict[Path, frozenset[str]] = {}
        if not self.tars:
            self.folder = existing(images, what)
            if self.folder.is_file():
                raise InputError(f"{what} {images} is a file; give a folder or tars")
            return
        hashes = [names_in(tar).hashes for tar in self.tars]
        numbers = np.repeat(np.arange(len(self.tars)), [len(part) for part in hashes])
        table = np.concatenate(hashes)
        order = np.argsort(table, kind="stable")
        self._hashes, self._numbers = table[order], numbers[order]

    def __str__(self) -> str:
        return self.images

    def path(self, name: str, where: str = "the data") -> Path:
        """Returns the path of an image; of one that is not there too, as reading it then says.

        Args:
            name: as it stands in a file, which `where` names.
            where: for the message.

        Raises:
            InputError: the name leads out of the folder, see `clip_base.storage.paths.image_in`.
        """
        if not self.tars:
            return image_in(self.folder, name, where)
        number = self._tar_with(name)
        return self.tars[max(number, 0)] / name

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        if self.tars:
            return self._tar_with(name) >= 0
        path = self.path(name)
        if path.parent not in self._listings:
            # One listing a folder is much quicker than asking for 118,287 files one by one.
            found = os.listdir(path.parent) if path.parent.is_dir() else []
            self._listings[path.parent] = frozenset(found)
        return path.name in self._listings[path.parent]

    def _tar_with(self, name: str) -> int:
        wanted = np.uint64(name_hash(PurePath(name).as_posix()))
        place = int(np.searchsorted(self._hashes, wanted, side="right")) - 1
        return int(self._numbers[place]) if place >= 0 and self._hashes[place] == wanted else -1
