"""Images from files, and the numbers CLIP's towers expect them as."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clip_base.errors import InputError

Pixels = npt.NDArray[np.uint8]

# The mean and deviation of each channel in [0, 1] that every published CLIP was trained with (openai/CLIP).
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

_AS_STORED = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION

cv2.setNumThreads(0)  # the training step has the cores
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # what does not decode is reported once, as an InputError


def decode(path: str | Path) -> Pixels:
    """Returns the image in `path` as [H, W, 3] RGB, in the file's own frame: an EXIF rotation is not applied.

    Greyscale, palette, CMYK and transparent files become RGB.

    Raises:
        InputError: the file is missing or does not decode.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from None
    return decode_bytes(data, str(path))


def decode_bytes(data: bytes, name: str) -> Pixels:
    """Returns the encoded image `data` as [H, W, 3] RGB; `name` is for the error message."""
    if data:
        # OpenCV knows the usual formats and is the faster; what it does not know is left to Pillow.
        decoded = None
        with contextlib.suppress(cv2.error):  # it refuses very large pictures so; Pillow then says why
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), _AS_STORED)
        if decoded is not None:
            return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image {name} does not decode: {error or 'it is empty'}") from None


def resize(image: Pixels, width: int, height: int) -> Pixels:
    """Returns the image at another size: area averaging on the way down, bicubic on the way up."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = width < image.shape[1] or height < image.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), dtype=np.uint8)


def normalise(pixels: Tensor) -> Tensor:
    """Returns uint8 pixels [..., 3, H, W] as float32, centred and scaled as CLIP's towers expect."""
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1) * 255
    deviation = torch.tensor(DEVIATION, device=pixels.device).view(3, 1, 1) * 255
    return (pixels.float() - mean) / deviation


def to_tensor(images: list[Pixels]) -> Tensor:
    """Stacks [H, W, 3] images of one size into [B, 3, H, W] uint8, channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class ImageStore:
    """Decodes images, at most `side` pixels on the short side, and keeps them in memory when asked to.

    Args:
        side: images whose short side is longer are scaled down to it; 0: never.
        keep: whether to keep what was decoded (uint8); for small images that are read many times.
    """

    def __init__(self, side: int = 0, keep: bool = False) -> None:
        self.side, self.keep = side, keep
        self._kept: dict[Path, Pixels] = {}

    def __call__(self, path: Path) -> Pixels:
        """Returns the image in `path` as [H, W, 3] RGB; see `decode`."""
        if path in self._kept:
            return self._kept[path]
        image = decode(path)
        short = min(image.shape[:2])
        if self.side and short > self.side:
            height, width = (round(side * self.side / short) for side in image.shape[:2])
            image = resize(image, width, height)
        if self.keep:
            self._kept[path] = image
        return image
