"""Images from files, and the numbers CLIP's towers expect them as."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clip_base.images.orientation import turned_as_annotated, turned_upright
from clip_base.runtime.errors import InputError

Pixels = npt.NDArray[np.uint8]

# The mean and deviation of each channel in [0, 1] that every published CLIP was trained with (openai/CLIP).
MEAN = (0.48145466, 0.4578275, 0.40821073)


DEVIATION = (0.26862954, 0.26130258, 0.27577711)

# How OpenCV decodes at 1, 1/2, 1/4 and 1/8 of the size.
_SCALES = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

cv2.setNumThreads(0)  # the training step has the cores


cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # what does not decode is reported once, as an InputError


class Stored(Protocol):
    """What holds an encoded image: a Path, or a part of a larger file. As text, it names itself."""

    def read_bytes(self) -> bytes:
        """Returns the encoded image."""


def decode(path: str | Stored, least: int = 0) -> Pixels:
    """Returns the image in `path` as [H, W, 3] RGB, in the file's own frame: an EXIF rotation is not applied,
    except to TIFF files, which every decoder turns; see `clip_base.images.orientation`.

    Greyscale, palette, CMYK and transparent files become RGB.

    Args:
        path: the file.
        least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (rounded up) as long as its short side
            keeps so many pixels; 0: at its own size.

    Raises:
        InputError: the file is missing or does not decode.
    """
    try:
        data = (Path(path) if isinstance(path, str) else path).read_bytes()
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from None
    return decode_bytes(data, path, least)


def decode_bytes(data: bytes, name: object, least: int = 0) -> Pixels:
    """Returns the encoded image `data` as [H, W, 3] RGB; `name`, as text, is for the error message."""
    if data:
        # OpenCV knows the usual formats and is the faster; what it does not know is left to Pillow.
        decoded = None
        with contextlib.suppress(cv2.error):  # it refuses very large pictures so; Pillow then says why
            flags = _SCALES[_reduction(data, least)] | cv2.IMREAD_IGNORE_ORIENTATION
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if decoded is not None:
            return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # which names an object in memory
        reason = "it is of no known form" if unknown else error
        raise InputError(f"image {name} does not decode: {reason if data else 'it is empty'}") from None


def _reduction(data: bytes, least: int) -> int:
    """Returns by how much the short side of a JPEG can shrink and keep `least` pixels: 1, 2, 4 or 8."""
    size = jpeg_size(data) if least else None
    if size is None:
        return 1
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or -(-min(size) // scale) >= least)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) from the header of a JPEG (ITU-T T.81, B.2.2); None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        elif marker == 0xDA:  # the picture itself begins
            return None
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


def resize(image: Pixels, width: int, height: int) -> Pixels:
    """Returns the image at another size: area averaging on the way down, bicubic on the way up."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = width < image.shape[1] or height < image.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), dtype=np.uint8)


def resize_bicubic(image: Pixels, width: int, height: int) -> Pixels:
    """Returns the image at another size by Pillow's antialiased bicubic filter, in a fraction of its time.

    torch computes it in whole numbers with a vector unit; a pixel is at most 2 of 255 levels off Pillow's.
    """
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last in memory
    sized = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(sized[0].permute(1, 2, 0).numpy())


def resize_bilinear(image: Pixels, width: int, height: int) -> Pixels:
    """Returns the image at another size by Pillow's bilinear filter, pixel for pixel as detectron2 does."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def middle_square(image: Pixels, side: int) -> Pixels:
    """Returns the middle [side, side, 3] of the image once its short side is `side`; CLIP's evaluation view.

    The frame of `clip_base.images.preprocess.Preprocess`, the filter of `resize_bicubic`.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    image = resize_bicubic(image, side * width // short, side * height // short)
    height, width = image.shape[:2]
    top, left = round((height - side) / 2), round((width - side) / 2)
    return image[top : top + side, left : left + side]


def normalize(pixels: Tensor) -> Tensor:
    """Returns uint8 pixels [..., 3, H, W] as float32, centred and scaled as CLIP's towers expect."""
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1) * 255
    deviation = torch.tensor(DEVIATION, device=pixels.device).view(3, 1, 1) * 255
    # In place: a large batch spends most of the time on memory that is new.
    return pixels.to(torch.float32, copy=True).sub_(mean).div_(deviation)


def to_tensor(images: list[Pixels]) -> Tensor:
    """Stacks [H, W, 3] images of one size into [B, 3, H, W] uint8, channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class ImageStore:
    """Decodes images, at most `side` pixels on the short side, and keeps them in memory when asked to.

    Args:
        side: images whose short side is longer are scaled down to it; 0: never.
        keep: whether to keep what was decoded (uint8); for small images that are read many times.
        least: what the short side of a JPEG must keep when it is decoded at a reduced size; see `decode`.
    """

    def __init__(self, side: int = 0, keep: bool = False, least: int = 0) -> None:
        self.side, self.keep, self.least = side, keep, least
        self._kept: dict[Stored, Pixels] = {}

    def __call__(self, path: Stored) -> Pixels:
        """Returns the image in `path` as [H, W, 3] RGB; see `decode`."""
        if path in self._kept:
            return self._kept[path]
        image = decode(path, self.least)
        short = min(image.shape[:2])
        if self.side and short > self.side:
            height, width = (round(side * self.side / short) for side in image.shape[:2])
            image = resize(image, width, height)
        if self.keep:
            self._kept[path] = image
        return image


def load_image(
    path: str | Path, size: tuple[int, int] | None = None, upright: bool = False, least: int = 0
) -> Tensor:
    """Returns an image as [3, H, W] uint8 RGB, whatever its file holds (grayscale, CMYK, a palette).

    Args:
        path: the image's file.
        size: (height, width) that the annotations state, see `turned_as_annotated`.
        upright: turn the pixels as EXIF says; for images that come without annotations.
        least: read a JPEG at a reduced size, see `decode`; not together with `size`.

    Raises:
        InputError: the file is missing, does not decode, or has another size than annotated.
    """
    pixels = decode(path, least)
    if upright:
        pixels = turned_upright(pixels, path)
    if size is not None:
        pixels = turned_as_annotated(pixels, path, size)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
