"""Inputs of a training or inference step: small frozen dataclasses, validated on construction."""

# B images, H and W the padded height and width, T token positions
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """Images padded to one size.

    Attributes:
        pixels: [B, 3, H, W] float, normalized by the tower's mean and deviation; zeros right of and below
            each image.
        sizes: [B, 2] int64, (height, width) of each image inside the frame, before padding.
    """

    pixels: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B, 3, H, W], got {list(self.pixels.shape)}")
        if self.sizes.shape != (len(self.pixels), 2):
            raise ValueError(f"sizes must be [{len(self.pixels)}, 2], got {list(self.sizes.shape)}")

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> ImageBatch:
        """Returns the same images on `device`."""
        return ImageBatch(self.pixels.to(device, non_blocking=True), self.sizes.to(device, non_blocking=True))

    @classmethod
    def whole(cls, pixels: Tensor) -> ImageBatch:
        """Wraps [B, 3, H, W] pixels that carry no padding."""
        height, width = pixels.shape[-2:]
        return cls(
            pixels, torch.tensor([[height, width]], dtype=torch.int64).expand(len(pixels), 2).contiguous()
        )

    @classmethod
    def pad(cls, images: list[Tensor], multiple: int = 1) -> ImageBatch:
        """Stacks [3, h, w] images, padded right and below with zeros to a multiple of `multiple`."""
        sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64).reshape(-1, 2)
        height, width = (-(-int(size) // multiple) * multiple for size in sizes.amax(0))
        pixels = images[0].new_zeros(len(images), 3, height, width)
        for slot, image in zip(pixels, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]] = image
        return cls(pixels, sizes)


@dataclass(frozen=True)
class ImageTextBatch:
    """Images and one caption for each.

    Attributes:
        images: B images.
        tokens: [B, T] int64 token ids, zero after the end-of-text token.
    """

    images: ImageBatch
    tokens: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or len(self.tokens) != len(self.images):
            raise ValueError(f"tokens must be [{len(self.images)}, T], got {list(self.tokens.shape)}")

    def to(self, device: torch.device | str) -> ImageTextBatch:
        """Returns the same batch on `device`."""
        return ImageTextBatch(self.images.to(device), self.tokens.to(device, non_blocking=True))
