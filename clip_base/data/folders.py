"""A folder of pairs: each image beside a text file of the same stem."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_base.data.sources import Pair, Pairs
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError
from clip_base.runtime.files import ENCODING_HELP, existing, is_file, read_text

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
)


@dataclass
class FolderConfig:
    """A folder and what its texts are called."""

    folder: str = option(REQUIRED, "folder of images and texts, subfolders included")
    suffix: str = option(".txt", "ending of the text beside an image; each of its lines is a caption")
    encoding: str = option("", ENCODING_HELP)


class FolderSource:
    """Images with a text of the same stem beside them, as img2dataset's `files` form has them."""

    def __init__(self, config: FolderConfig) -> None:
        self.config = config

    def pairs(self) -> Pairs:
        """Returns one pair an image, sorted by path; texts are read when a pair is drawn."""
        root = existing(self.config.folder, "folder")
        images = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise InputError(f"folder {root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return Beside(images, self.config.suffix, self.config.encoding)


class Beside:
    """Pairs of images and the texts beside them.

    Args:
        images: the images.
        suffix: ending of a text's name.
        encoding: of the texts; "": UTF-8.
    """

    def __init__(self, images: list[Path], suffix: str, encoding: str = "") -> None:
        self.images, self.suffix, self.encoding = images, suffix, encoding

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Pair:
        """Returns image `index` and the lines of its text; InputError when there is none or it is empty."""
        image = self.images[index]
        text = image.with_suffix(self.suffix)
        if not is_file(text):
            raise InputError(f"image {image} has no caption: there is no file {text.name} beside it")
        try:
            lines = read_text(text, "text", self.encoding).splitlines()
        except InputError as error:
            raise InputError(f"image {image} has no caption: {error}") from None
        captions = tuple(" ".join(line.split()) for line in lines if line.strip())
        if not captions:
            raise InputError(f"image {image} has no caption: {text.name} is empty")
        return Pair(image, captions)
