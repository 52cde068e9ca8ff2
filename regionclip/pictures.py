"""Pictures as people have them, files or in memory, as pixels; large ones at a reduced size."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from clip_base.data.images import Pixels
from clip_base.data.images import resize as shrink
from clip_base.errors import InputError
from clip_base.files import existing
from regionclip.datasets import load_image

Picture = str | Path | Image.Image | Pixels | Tensor

LARGE = 25_000_000  # pixels
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def picture_files(places: Sequence[str]) -> list[Path]:
    """Returns the picture files among some paths; a folder stands for the pictures directly in it.

    Raises:
        InputError: a path does not exist, or a folder holds no picture.
    """
    files: list[Path] = []
    for place_ in places:
        path = existing(place_, "picture")
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
            if not inside:
                raise InputError(f"folder {path} holds no pictures ({', '.join(PICTURES)})")
            files += inside
        else:
            files.append(path)
    return files


def read_picture(picture: Picture) -> tuple[Pixels, tuple[int, int]]:
    """Returns a picture as [H, W, 3] uint8 RGB, and its (height, width), which is larger when it was reduced.

    Args:
        picture: a file's path, a PIL image, an array [H, W, 3] or [H, W] uint8, or a tensor [3, H, W],
            uint8 or floating in [0, 1]. Files and PIL images are turned as their EXIF note says.

    Raises:
        InputError: a file does not decode.
        ValueError: an array or a tensor of another form.
    """
    if isinstance(picture, str | Path):
        return read_upright(Path(picture))
    if isinstance(picture, Image.Image):
        pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    elif isinstance(picture, Tensor):
        pixels = _of_tensor(picture)
    else:
        pixels = np.asarray(picture)
        pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"a picture is [H, W, 3] uint8, got {list(pixels.shape)} {pixels.dtype}")
    return pixels, (pixels.shape[0], pixels.shape[1])


def _of_tensor(picture: Tensor) -> Pixels:
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture's tensor is [3, H, W], got {list(picture.shape)}")
    if picture.is_floating_point():
        low, high = float(picture.min()), float(picture.max())
        if low < 0 or high > 1:
            raise ValueError(f"a floating picture lies in [0, 1], got {low:g}…{high:g}; was it normalised?")
        picture = (picture * 255).round().byte()
    pixels: Pixels = picture.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    return pixels


def read_upright(file: Path) -> tuple[Pixels, tuple[int, int]]:
    """Returns a picture as people see it, turned as its EXIF note says, and its (height, width).

    Of more than `LARGE` pixels the picture is reduced, so that memory stays bounded; a JPEG is reduced as it
    is decoded.

    Raises:
        InputError: the picture does not decode, or is larger than Pillow takes to be harmless.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as header:
                width, height = header.size
        except Image.DecompressionBombError as error:
            raise InputError(f"picture {file} is too large: {error}; make it smaller") from None
        except (OSError, ValueError, SyntaxError):
            width = height = 0  # decoding says what is wrong, or knows a form that Pillow does not
        many = width * height > LARGE
        least = round(min(width, height) * (LARGE / (width * height)) ** 0.5) if many else 0
        pixels = load_image(file, upright=True, least=least).permute(1, 2, 0).numpy()
    h, w = pixels.shape[:2]
    size = (height, width) if many else (h, w)
    if (h > w) != (size[0] > size[1]):
        size = size[::-1]  # turned
    if h * w > LARGE:
        factor = (LARGE / (h * w)) ** 0.5
        pixels = shrink(pixels, round(w * factor), round(h * factor))
    return pixels, size
