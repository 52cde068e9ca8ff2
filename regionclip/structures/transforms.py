"""Resizing, flipping and padding of images and their boxes, and the inverse for boxes."""

# H, W original height and width; h, w height and width in the frame
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import Pixels, normalize, resize, resize_bilinear
from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError, quote
from regionclip.structures.boxes import area, clip_boxes


@dataclass
class JitterConfig:
    """Large-scale jitter (arXiv 2012.07177, section 3): images of a drawn scale in a fixed square."""

    side: int = option(0, "side of the square in pixels (published: 1024); 0: no jitter")
    low: float = option(0.1, "smallest sampled scale; at 1 the image just fits into the square")
    high: float = option(2.0, "largest sampled scale; larger images are cropped at random")
    visible: float = option(0.25, "boxes that keep a smaller fraction of their area are left out")

    def __post_init__(self) -> None:
        if self.side < 0 or self.side % 32:
            raise InputError(f"resize.jitter.side must be a multiple of 32 pixels, found {self.side}")
        if not 0 < self.low <= self.high:
            raise InputError(f"0 < resize.jitter.low ≤ high must hold, found {self.low} and {self.high}")
        if not 0 < self.visible <= 1:
            raise InputError(f"resize.jitter.visible must be in (0, 1], found {self.visible}")


@dataclass
class ResizeConfig:
    """How large images are made. The published recipe: sides of 800 and at most 1333 (arXiv 2112.09106)."""

    short: list[int] = option([800], "short side in pixels; several values are for training")
    long: int = option(1333, "maximum long side in pixels")
    filter: str = option(
        "area",
        "area averages when downscaling and is faster; bilinear is Pillow's, as in detectron2",
        choices=("area", "bilinear"),
    )
    multiple: int = option(
        32, "batches are padded to multiples of this; 1: no padding of single images, as in detectron2"
    )

    def __post_init__(self) -> None:
        if not self.short or min(self.short) < 16 or self.long < max(self.short):
            raise InputError(
                f"resize.short={quote(self.short)} must be at least 16 and at most resize.long={self.long}"
            )
        if self.multiple < 1:
            raise InputError(f"resize.multiple must be at least 1 pixel, found {self.multiple}")


@dataclass
class TrainingResizeConfig(ResizeConfig):
    """How large images are made in training, and what is drawn for each."""

    short: list[int] = option([800], "short side in pixels; of several values one is drawn for each image")
    flip: bool = option(True, "mirror half of the images")
    jitter: JitterConfig = option(JitterConfig(), "large-scale jitter, instead of `short` and `long`")

    def as_seen(self) -> ResizeConfig:
        """Returns the sizes alone: how images are seen after training."""
        return ResizeConfig(self.short, self.long, self.filter, self.multiple)

    @property
    def training_multiple(self) -> int:
        """What the sides of a training batch are multiples of: with jitter, it is the square itself."""
        return self.jitter.side or self.multiple


@dataclass(frozen=True)
class ResizeTransform:
    """Where an original image is in the batch's frame.

    Attributes:
        original: (H, W) in pixels.
        size: (h, w) that the image takes in the frame.
        flipped: whether it is mirrored left to right.
        window: (top, left, full height, full width) when the frame shows a window of `size` out of a larger
            resized image; None: it shows all of it.
    """

    original: tuple[int, int]
    size: tuple[int, int]
    flipped: bool = False
    window: tuple[int, int, int, int] | None = None

    def apply_boxes(self, boxes: Tensor) -> Tensor:
        """Brings [N, 4] original boxes (x1, y1, x2, y2) into the frame, cut at the edges of a window."""
        boxes = self._mirrored(boxes * self._factors(boxes))
        if self.window is None:
            return boxes
        return clip_boxes(boxes - self._corner(boxes), self.size)

    def invert_boxes(self, boxes: Tensor) -> Tensor:
        """Brings [N, 4] boxes of the frame back to the original image."""
        if self.window is not None:
            boxes = boxes + self._corner(boxes)
        return self._mirrored(boxes) / self._factors(boxes)

    def visible(self, boxes: Tensor) -> Tensor:
        """Returns [N], the share of the area of original boxes [N, 4] that the frame shows; 1 without window.

        A box without area shows nothing in a window.
        """
        if self.window is None:
            return torch.ones(len(boxes))
        whole = area(boxes * self._factors(boxes))
        return area(self.apply_boxes(boxes)) / whole.clamp(min=torch.finfo(whole.dtype).tiny)

    def _mirrored(self, boxes: Tensor) -> Tensor:
        if not self.flipped:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(1)
        width = self.size[1] if self.window is None else self.window[3]
        return torch.stack([width - x2, y1, width - x1, y2], 1)

    def _corner(self, boxes: Tensor) -> Tensor:
        assert self.window is not None
        top, left = self.window[:2]
        return boxes.new_tensor([left, top, left, top])

    def _factors(self, boxes: Tensor) -> Tensor:
        (height, width), (h, w) = self.original, self.size if self.window is None else self.window[2:]
        return boxes.new_tensor([w / width, h / height, w / width, h / height])


def resize_shortest_edge(
    image: Pixels, short: int, long: int, flip: bool = False, filter: str = "area"
) -> tuple[Pixels, ResizeTransform]:
    """Makes the short side of an [H, W, 3] image `short`, unless the long one would exceed `long`.

    Sides are rounded as by detectron2's ResizeShortestEdge: halves up.

    Args:
        image: the original.
        short: pixels.
        long: pixels.
        flip: whether to mirror it.
        filter: "area", or "bilinear" for Pillow's bilinear filter.
    """
    height, width = image.shape[:2]
    scale = short / min(height, width)
    if max(height, width) * scale > long:
        scale *= long / (max(height, width) * scale)
    h, w = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
    placed = _resized(image, w, h, flip, filter)
    return placed, ResizeTransform((height, width), (h, w), flip)


def random_resize(
    image: Pixels, config: TrainingResizeConfig, generator: torch.Generator
) -> tuple[Pixels, ResizeTransform]:
    """Draws how a training image is in its frame, and places it there.

    With jitter the image is scaled by a number drawn evenly from `low`…`high` times what makes it fit the
    square, and what exceeds the square is cut off on a random side; the batch pads what falls short.
    """
    jitter = config.jitter
    if not jitter.side:
        short, flip = draw_placement(config, generator)
        return resize_shortest_edge(image, short, config.long, flip, config.filter)
    height, width = image.shape[:2]
    draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    scale = (jitter.low + (jitter.high - jitter.low) * draws[0]) * jitter.side / max(height, width)
    full_h, full_w = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
    h, w = min(full_h, jitter.side), min(full_w, jitter.side)
    top, left = int((full_h - h + 1) * draws[1]), int((full_w - w + 1) * draws[2])
    flip = config.flip and draws[3] < 0.5
    placed = _resized(image, full_w, full_h, flip, config.filter)[top : top + h, left : left + w]
    frame = ResizeTransform((height, width), (h, w), flip, (top, left, full_h, full_w))
    return np.ascontiguousarray(placed), frame


def _resized(image: Pixels, width: int, height: int, flip: bool, filter: str) -> Pixels:
    placed = resize(image, width, height) if filter == "area" else resize_bilinear(image, width, height)
    # numpy calls a line of single pixels contiguous even backwards, which torch does not take.
    return placed[:, ::-1].copy() if flip else placed


def draw_placement(config: TrainingResizeConfig, generator: torch.Generator) -> tuple[int, bool]:
    """Draws a training image's short side and whether it is mirrored."""
    short = config.short[int(torch.randint(len(config.short), (1,), generator=generator))]
    return short, config.flip and bool(torch.rand(1, generator=generator) < 0.5)


def to_batch(images: Sequence[Pixels], multiple: int = 1) -> ImageBatch:
    """Normalizes and pads [h, w, 3] images into one batch; padded sides are multiples of `multiple`."""
    if len({image.shape for image in images}) == 1 and not any(
        side % multiple for side in images[0].shape[:2]
    ):
        pixels = torch.from_numpy(np.stack(images)).permute(
            0, 3, 1, 2
        )  # [B, 3, h, w], channels last in memory
        return ImageBatch.whole(normalize(pixels))
    return ImageBatch.pad([normalize(torch.from_numpy(image).permute(2, 0, 1)) for image in images], multiple)
