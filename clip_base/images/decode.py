"""Decoding of image files, and the normalized pixels that CLIP's towers expect."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_base.images.headers import (
    PNG,
    chunks_of,
    open_image,
    plain_size,
    read_image_file,
    require_size,
    undecodable,
)
from clip_base.images.headers import Stored as Stored
from clip_base.images.orientation import Decoded as Decoded
from clip_base.images.orientation import Pixels as Pixels
from clip_base.images.orientation import size_of as size_of
from clip_base.images.orientation import turned_as_annotated, turned_upright
from clip_base.runtime.errors import InputError

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


def decode(path: str | Stored, least: int = 0) -> Pixels:
    """Returns the image in `path` as [H, W, 3] RGB, in the file's own frame: an EXIF rotation is not applied,
    except to TIFF files, which every decoder turns; see `clip_base.images.orientation`.

    Gray, palette, CMYK and transparent files become RGB as Pillow's `convert` makes them.

    Args:
        path: the file.
        least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (rounded up) as long as its short side
            keeps so many pixels; 0: at its own size.

    Raises:
        InputError: the file is missing, does not decode, or has more than 8 bits per channel and one channel.
    """
    return as_rgb(decode_stored(path, least))


def decode_bytes(data: bytes, name: object, least: int = 0) -> Pixels:
    """Returns the encoded image `data` as [H, W, 3] RGB; `name`, as text, is for the error message."""
    return as_rgb(decode_data(data, name, least))


def decode_stored(path: str | Stored, least: int = 0) -> Decoded:
    """Returns the image in `path` as its file stores it: [H, W, 3] of RGB and gray files, else a PIL image.

    Filters treat palettes, transparency and CMYK otherwise than the RGB that they become; who resizes as
    openai/CLIP does needs them. See `decode` for the arguments and errors.
    """
    return decode_data(read_bytes(path), path, least)


def read_bytes(path: str | Stored) -> bytes:
    """Returns a file's content; InputError when it cannot be read."""
    if isinstance(path, str | Path):
        return read_image_file(Path(path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from None


def as_rgb(image: Decoded) -> Pixels:
    """Returns a decoded image as [H, W, 3] RGB."""
    if not isinstance(image, Image.Image):
        return image
    # Of transparency that its palette stores as bytes Pillow warns; RGB has none in any case.
    palette = image.mode == "P" and "transparency" in image.info
    if palette:
        image = image.copy()
        del image.info["transparency"]
    return np.array(image.convert("RGB"))


def require_depth(image: Image.Image, name: object) -> None:
    """Raises an InputError for pixels of more than 8 bits per channel, as Pillow keeps those of one channel.

    It would cut them off at 255 instead of scaling them, and which number is white no file says reliably.
    """
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"image {name} has one channel of more than 8 bits (mode {image.mode}), and the file does not "
            "say which value is white; scale it and save it with 8 bits"
        )


def decode_data(data: bytes, name: object, least: int = 0) -> Decoded:
    """Returns the encoded image `data` as `decode_stored` does; `name`, as text, is for the error message."""
    if _is_plain(data):
        size = jpeg_size(data)
        require_size(plain_size(data) if size is None else size, name)
        if data.startswith(PNG):
            chunks_of(io.BytesIO(data[len(PNG) :]), name)
        # OpenCV is the faster and gives Pillow's pixels; what it cannot decode Pillow explains.
        decoded = None
        with contextlib.suppress(cv2.error):  # it refuses very large images so
            flags = _SCALES[_reduction(data, least)] | cv2.IMREAD_IGNORE_ORIENTATION
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if decoded is not None:
            return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    if not data:
        raise InputError(f"image {name} does not decode: it is empty")
    with open_image(io.BytesIO(data), name) as image:
        require_depth(image, name)
        try:
            image.load()
        except Exception as error:  # decoders raise what they like
            raise undecodable(error, name) from None
        if image.mode in ("RGB", "L"):
            return np.array(image.convert("RGB"))
        return image


def _is_plain(data: bytes) -> bool:
    """Whether a file holds gray or RGB pixels of 8 bits in a form that OpenCV decodes as Pillow does."""
    frame = _jpeg_frame(data)
    if frame is not None:
        return frame[2] in (1, 3)
    if data[:8] == PNG:  # depth and color type of the header; acTL: an animation
        return data[24:26] in (b"\x08\x00", b"\x08\x02", b"\x10\x02") and b"acTL" not in data[33:400]
    if data[:2] == b"BM":  # 24 bits per pixel, not compressed
        return data[28:34] == b"\x18\x00\x00\x00\x00\x00"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":  # lossy; in the extended form neither alpha nor frames
        return data[12:16] == b"VP8 " or (data[12:16] == b"VP8X" and not int.from_bytes(data[20:21]) & 0x12)
    return False


def _reduction(data: bytes, least: int) -> int:
    """Returns by how much the short side of a JPEG can shrink and keep `least` pixels: 1, 2, 4 or 8."""
    size = jpeg_size(data) if least else None
    if size is None:
        return 1
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or -(-min(size) // scale) >= least)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) from the header of a JPEG; None for anything else."""
    frame = _jpeg_frame(data)
    return None if frame is None else frame[:2]


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Returns height, width and channels from the header of a JPEG (ITU-T T.81, B.2.2), or None."""
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            sides = (int.from_bytes(data[at : at + 2]) for at in (place + 5, place + 7))
            return next(sides), next(sides), data[place + 9]
        elif marker == 0xDA:  # the image itself begins
            return None
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


def cut(image: Decoded, left: int, top: int, right: int, bottom: int) -> Decoded:
    """Returns the part of an image between these pixels, the last ones not included."""
    if isinstance(image, Image.Image):
        return image.crop((left, top, right, bottom))
    return image[top:bottom, left:right]


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


def evaluation_frame(height: int, width: int, side: int) -> tuple[tuple[int, int], int, int]:
    """Returns (width, height) of CLIP's evaluation view, and left and top of the square cut out of it.

    The short side is `side` pixels, the long one rounded down, as in openai/CLIP's torchvision pipeline.
    """
    short = min(height, width)
    width, height = side * width // short, side * height // short
    return (width, height), round((width - side) / 2), round((height - side) / 2)


def middle_square(image: Pixels, side: int) -> Pixels:
    """Returns the middle [side, side, 3] of the image once its short side is `side`; CLIP's evaluation view.

    The frame of `clip_base.images.preprocess.Preprocess`, the filter of `resize_bicubic`.
    """
    height, width = image.shape[:2]
    size, left, top = evaluation_frame(height, width, side)
    image = resize_bicubic(image, *size)
    return image[top : top + side, left : left + side]


def normalize(pixels: Tensor) -> Tensor:
    """Returns uint8 pixels [..., 3, H, W] as float32, centered and scaled as CLIP's towers expect."""
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
        self._kept: dict[Stored, Decoded] = {}

    def __call__(self, path: Stored) -> Pixels:
        """Returns the image in `path` as [H, W, 3] RGB; see `decode`."""
        return as_rgb(self.stored(path))

    def stored(self, path: Stored) -> Decoded:
        """Returns the image in `path` as its file stores it; see `decode_stored`."""
        if path in self._kept:
            return self._kept[path]
        image = decode_stored(path, self.least)
        height, width = size_of(image)
        short = min(height, width)
        if self.side and short > self.side:
            height, width = (round(side * self.side / short) for side in (height, width))
            if isinstance(image, Image.Image):
                image = image.resize((width, height), Image.Resampling.BOX)
            else:
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
