"""Which image of a file of proposals an image is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clip_base.runtime.errors import InputError, quote
from regionclip.data.file_names import FileNames, name_images
from regionclip.structures.regions import ImageInfo


class Origins:
    """Finds a file's id of an image: by file name, else by key, else the ids are the same.

    A file's names decide where it has them, see `FileNames`. A key, such as a tar's `__key__`, finds images
    whose tars were named or cut otherwise; where a file name stands beside it, it counts only when it is
    that name's stem, since a COCO id is a key too and says nothing about other data. An image that is found
    by its key must have the size that the file states.

    Args:
        where: the file, for messages.

    Attributes:
        names: file name of each image, by the file's id; empty where it has none.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.names: dict[int, str] = {}
        self._keys: dict[int, str] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._by_name: FileNames | None = None
        self._by_key: dict[str, list[int]] | None = None
        self._asked: dict[int, str] = {}

    def add(self, entry: Mapping[str, Any], where: str) -> None:
        """Adds what an entry with `image_id` says of its image; the entry stands at `where`.

        Raises:
            InputError: the id was another image's, or a key or a size is none.
        """
        image_id, name, key = entry["image_id"], entry.get("file_name"), entry.get("key")
        if name:
            name_images(self.names, [(image_id, str(name))], self.where)
        if key is not None and not isinstance(key, str):
            raise InputError(f"{where}: key must be a text, found {quote(key)}")
        if key and _is_stem(key, str(name or "")):
            name_images(self._keys, [(image_id, key)], self.where)
            size = entry.get("height"), entry.get("width")
            if all(isinstance(side, int) for side in size):
                self._sizes[image_id] = (int(size[0] or 0), int(size[1] or 0))

    def find(self, image: ImageInfo) -> int | None:
        """Returns the file's id of an image; None: it has no boxes of it.

        Raises:
            InputError: the image may be several of the file's or has another size there, or the file only has
                ids and those of the images say nothing.
        """
        if not self.names and not self._keys:
            if image.key and image.key != str(image.image_id):
                raise InputError(
                    f"{self.where} has neither file_name nor key, and the ids of these images, such as "
                    f"{image.file_name or image.key}, only count them; write proposals with `regionclip "
                    "propose` of the same images, without annotations="
                )
            return image.image_id
        if not image.file_name and not image.key:  # in memory
            return image.image_id
        found = None
        if self.names and image.file_name:
            self._by_name = self._by_name or FileNames(self.names, self.where)
            found = self._by_name.find(image.file_name)
        return self._of_key(image) if found is None else found

    def _of_key(self, image: ImageInfo) -> int | None:
        if self._by_key is None:
            self._by_key = {}
            for image_id, key in self._keys.items():
                self._by_key.setdefault(key, []).append(image_id)
        if not image.key or not _is_stem(image.key, image.file_name):
            return None
        ids = self._by_key.get(image.key, [])
        name = image.file_name or image.key
        if len(ids) > 1:
            shown = " and ".join(self.names.get(one, str(one)) for one in ids[:2])
            raise InputError(
                f"{name} has the key {image.key!r}, which several images of {self.where} have: {shown}; "
                "propose for the tars as they are now"
            )
        if not ids:
            return None
        if self._asked.setdefault(ids[0], name) != name:
            raise InputError(
                f"{self._asked[ids[0]]} and {name} have the same key {image.key!r}, which {self.where} has "
                "once; propose for the tars as they are now"
            )
        size = self._sizes.get(ids[0])
        if size is not None and size != (image.height, image.width):
            raise InputError(
                f"{name} has {image.width} × {image.height} pixels, but the image with its key {image.key!r} "
                f"in {self.where} had {size[1]} × {size[0]}; it is another image: propose again"
            )
        return ids[0]


def _is_stem(key: str, file_name: str) -> bool:
    return not file_name or f"/{key}." in f"/{file_name}"
