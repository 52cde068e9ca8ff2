"""A folder of pairs: each image next to a text file with the same stem."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_base.data.sources import SPLIT_LINES_HELP, Pair, Pairs, captions_in
from clip_base.images.folders import list_images
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError
from clip_base.storage.files import ENCODING_HELP, is_file, read_text


@dataclass
class FolderConfig:
    """A folder and what its texts are called."""

    folder: str = option(REQUIRED, "folder of images and texts, subfolders included")
    suffix: str = option(".txt", "file extension of the text next to an image")
    split_lines: bool = option(True, SPLIT_LINES_HELP)
    encoding: str = option("", ENCODING_HELP)


class FolderSource:
    """Images with a text of the same stem beside them, as img2dataset's `files` form has them."""

    def __init__(self, config: FolderConfig) -> None:
        self.config = config

    def pairs(self) -> Pairs:
        """Returns one pair per image, sorted by path; texts are read when a pair is sampled."""
        return Beside(list_images(self.config.folder, "folder"), self.config)


class Beside:
    """Pairs of images and the texts beside them.

    Args:
        images: the images.
        config: how the texts are called and written.
    """

    def __init__(self, images: list[Path], config: FolderConfig) -> None:
        self.images, self.config = images, config

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Pair:
        """Returns image `index` and the captions in its text; InputError when there are none."""
        image = self.images[index]
        text = image.with_suffix(self.config.suffix)
        if not is_file(text):
            raise InputError(f"image {image} has no caption: there is no file {text.name} next to it")
        try:
            captions = captions_in(read_text(text, "text", self.config.encoding), self.config.split_lines)
        except InputError as error:
            raise InputError(f"image {image} has no caption: {error}") from None
        if not captions:
            raise InputError(f"image {image} has no caption: {text.name} is empty")
        return Pair(image, captions)
