"""What the published models saw at their evaluation: a PIL image as a square tensor."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_base.images.decode import normalize


class Preprocess:
    """Resizes the short side to `resolution` pixels, cuts the middle square out and normalises it.

    The same numbers as openai/CLIP's torchvision pipeline: Pillow's antialiased bicubic filter, the long side
    rounded down, CLIP's mean and deviation.

    Args:
        resolution: R, side of the square in pixels.
    """

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns [3, R, R] float32 of an image in any mode."""
        side = self.resolution
        image = image.convert("RGB")
        width, height = image.size
        short = min(width, height)
        if short != side:
            size = (side, side * height // width) if width == short else (side * width // height, side)
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        square = np.array(image.crop((left, top, left + side, top + side)))  # [R, R, 3]
        return normalize(torch.from_numpy(square).permute(2, 0, 1))

    def __repr__(self) -> str:
        return f"Preprocess({self.resolution})"
