"""Preprocessing of the published models in evaluation: from a PIL image to a square tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clip_base.images.decode import (
    DEVIATION,
    MEAN,
    Decoded,
    Pixels,
    as_rgb,
    cut,
    evaluation_frame,
    middle_square,
    normalize,
    require_depth,
    resize_bicubic,
)
from clip_base.runtime.errors import InputError


class Preprocess:
    """Resizes the short side to `resolution` pixels, cuts the middle square out and normalizes it.

    The same numbers as openai/CLIP's torchvision pipeline, for images of every mode: Pillow's antialiased
    bicubic filter works on the image's own pixels (with transparency or a palette that is another result than
    on RGB), the long side is rounded down, what was cut out becomes RGB. An EXIF rotation is not applied.

    Args:
        resolution: R, side of the square in pixels.
    """

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    @functools.cached_property
    def transforms(self) -> list[Callable[[Any], Any]]:
        """The steps as torchvision's transforms, under its `Compose`'s name.

        Once somebody has looked at the list, images go through it, so that what is changed in it counts.
        """
        from torchvision import transforms as steps  # noqa: PLC0415 (slow, and seldom needed)

        return [
            steps.Resize(self.resolution, interpolation=steps.InterpolationMode.BICUBIC),
            steps.CenterCrop(self.resolution),
            _to_rgb,
            steps.ToTensor(),
            steps.Normalize(MEAN, DEVIATION),
        ]

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns [3, R, R] float32 of an image in any mode of 8 bits per channel.

        Raises:
            InputError: it is no PIL image, or has one channel of more than 8 bits.
        """
        if not isinstance(image, Image.Image):
            raise InputError(
                f"preprocessing takes a PIL image, got {type(image).__name__}; convert an array with "
                "PIL.Image.fromarray"
            )
        require_depth(image, getattr(image, "filename", "") or repr(image))
        if "transforms" in self.__dict__:
            out: Any = image
            for step in self.transforms:
                out = step(out)
            changed: Tensor = out
            return changed
        square = torch.from_numpy(self.square(image))  # [R, R, 3]
        return normalize(square.permute(2, 0, 1))

    def square(self, image: Image.Image) -> Pixels:
        """Returns [R, R, 3] RGB, the pixels before they are normalized."""
        side = self.resolution
        size, left, top = evaluation_frame(image.height, image.width, side)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return as_rgb(image.crop((left, top, left + side, top + side)))

    def __repr__(self) -> str:
        return f"Preprocess({self.resolution})"


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def square_view(image: Decoded, side: int) -> Pixels:
    """Returns the [side, side, 3] that `Preprocess` sees, of RGB pixels by the filter of `resize_bicubic`."""
    if isinstance(image, Image.Image):
        return Preprocess(side).square(image)
    return middle_square(image, side)


def cut_and_resize(image: Decoded, left: int, top: int, size: int, side: int) -> Pixels:
    """Returns the square of `size` pixels at (left, top) as [side, side, 3] RGB; `Preprocess`'s filter."""
    piece = cut(image, left, top, left + size, top + size)
    if isinstance(piece, Image.Image):
        return as_rgb(piece.resize((side, side), Image.Resampling.BICUBIC))
    return resize_bicubic(piece, side, side)
