"""From a photograph to the batch's frame and back: resize, flip, pad; boxes follow."""

# H, W original height and width; h, w height and width in the frame
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clip_base.batch import ImageBatch
from clip_base.config import option
from clip_base.data.images import Pixels, normalise, resize
from clip_base.errors import InputError


@dataclass
class ResizeConfig:
    """How large images are made. The published recipe: sides of 800 and at most 1333 (arXiv 2112.09106)."""

    short: list[int] = option([800], "pixels of the short side; of several, training draws one an image")
    long: int = option(1333, "pixels that the long side may have at most")
    flip: bool = option(True, "mirror half of the training images")

    def __post_init__(self) -> None:
        if not self.short or min(self.short) < 16 or self.long < max(self.short):
            raise InputError(
                f"resize.short={self.short} must be at least 16 and at most resize.long={self.long}"
            )


@dataclass(frozen=True)
class Frame:
    """Where an original image lies in the batch's frame.

    Attributes:
        original: (H, W) in pixels.
        size: (h, w) that the resized image takes in the frame.
        flipped: whether it is mirrored left to right.
    """

    original: tuple[int, int]
    size: tuple[int, int]
    flipped: bool = False

    def boxes_in(self, boxes: Tensor) -> Tensor:
        """Brings [N, 4] original boxes (x1, y1, x2, y2) into the frame."""
        boxes = boxes * self._factors(boxes)
        if self.flipped:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([self.size[1] - x2, y1, self.size[1] - x1, y2], 1)
        return boxes

    def boxes_out(self, boxes: Tensor) -> Tensor:
        """Brings [N, 4] boxes of the frame back to the original image."""
        if self.flipped:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([self.size[1] - x2, y1, self.size[1] - x1, y2], 1)
        return boxes / self._factors(boxes)

    def _factors(self, boxes: Tensor) -> Tensor:
        (height, width), (h, w) = self.original, self.size
        return boxes.new_tensor([w / width, h / height, w / width, h / height])


def place(image: Pixels, short: int, long: int, flip: bool = False) -> tuple[Pixels, Frame]:
    """Makes the short side of an [H, W, 3] image `short`, unless the long one would exceed `long`."""
    height, width = image.shape[:2]
    scale = min(short / min(height, width), long / max(height, width))
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    placed = resize(image, w, h)
    if flip:
        placed = np.ascontiguousarray(placed[:, ::-1])
    return placed, Frame((height, width), (h, w), flip)


def draw_placement(config: ResizeConfig, generator: torch.Generator) -> tuple[int, bool]:
    """Draws a training image's short side and whether it is mirrored."""
    short = config.short[int(torch.randint(len(config.short), (1,), generator=generator))]
    return short, config.flip and bool(torch.rand(1, generator=generator) < 0.5)


def to_batch(images: Sequence[Pixels], multiple: int = 1) -> ImageBatch:
    """Normalises and pads [h, w, 3] images into one batch; padded sides are multiples of `multiple`."""
    if len({image.shape for image in images}) == 1 and not any(
        side % multiple for side in images[0].shape[:2]
    ):
        pixels = torch.from_numpy(np.stack(images)).permute(
            0, 3, 1, 2
        )  # [B, 3, h, w], channels last in memory
        return ImageBatch.whole(normalise(pixels))
    return ImageBatch.pad([normalise(torch.from_numpy(image).permute(2, 0, 1)) for image in images], multiple)
