"""Image crops around boxes, as JPEG inside the page and within a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from clip_base.images.decode import decode
from clip_base.images.headers import Stored
from clip_base.images.html import data_uri
from clip_base.images.orientation import turned_as_annotated
from clip_base.runtime.errors import InputError

RGB = tuple[int, int, int]

# Shown around a box, in longer sides of it: enough to tell what the box cuts off.
CONTEXT = 1.7
CROP_SIDE = 240


@dataclass(frozen=True)
class LabeledImage:
    """An image for a page.

    Attributes:
        src: a `data:` address.
        alt: what it shows, for those who do not see it.
        caption: what stands below it: (class of the style sheet, text).
    """

    src: str
    alt: str
    caption: Sequence[tuple[str, str]]


class CropBudget:
    """Makes crops that together stay below a number of bytes.

    Args:
        limit: bytes that all addresses may take; None: any number.

    Attributes:
        left_out: crops that were not made, since the page was full.
        unreadable: crops that were not made, since the image could not be read.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._left = float("inf") if limit is None else limit
        self.left_out = self.unreadable = 0

    def crop(
        self,
        path: Path | Stored,
        size: tuple[int, int],
        box: Sequence[float],
        color: RGB,
        alt: str,
        caption: Sequence[tuple[str, str]],
    ) -> LabeledImage | None:
        """Returns a box with its surroundings; None: `left_out` or `unreadable`.

        See `crop_around` and `LabeledImage`.
        """
        if self._left > 0:
            try:
                src = data_uri(crop_around(path, size, box, color))
            except InputError:
                self.unreadable += 1
                return None
            if len(src) <= self._left:
                self._left -= len(src)
                return LabeledImage(src, alt, caption)
            self._left = 0  # a smaller one after it would hide that the page is full
        self.left_out += 1
        return None


def crop_around(path: Path | Stored, size: tuple[int, int], box: Sequence[float], color: RGB) -> Image.Image:
    """Returns a square around a box with the box drawn; near a border it is moved into the image.

    Args:
        path: the image's file.
        size: (height, width) of the image that the box is in, in pixels.
        box: x1, y1, x2, y2 in pixels.
        color: of the box.

    Raises:
        InputError: the image cannot be read, or has another size.
    """
    image = Image.fromarray(turned_as_annotated(decode(path), path, size))
    x1, y1, x2, y2 = box
    side = min(CONTEXT * max(x2 - x1, y2 - y1, 8.0), min(image.size))
    left = min(max((x1 + x2 - side) / 2, 0), image.width - side)
    top = min(max((y1 + y2 - side) / 2, 0), image.height - side)
    window = (left, top, left + side, top + side)
    crop = image.resize((CROP_SIDE, CROP_SIDE), Image.Resampling.BICUBIC, box=window)
    factor = CROP_SIDE / side
    edges = [(x1 - left) * factor, (y1 - top) * factor, (x2 - left) * factor, (y2 - top) * factor]
    inside = [min(max(edge, 1), CROP_SIDE - 2) for edge in edges]
    pen = ImageDraw.Draw(crop)
    pen.rectangle([inside[0] - 1, inside[1] - 1, inside[2] + 1, inside[3] + 1], outline=(20, 20, 20), width=5)
    pen.rectangle(inside, outline=color, width=3)
    return crop
