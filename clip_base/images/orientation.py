"""Orientation of images: as stored, or rotated by their EXIF orientation.

A camera may store an image on its side or upside down with a note that says how to turn it. Annotations made
from the raw pixels are in the stored frame, those of tools that show images upright in the turned one. One
rule for every reader: the annotated size decides; where it fits both frames (180°, mirrored or square images)
or is not known, the image is turned.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_base.images.headers import Stored, may_be_turned, open_image_file
from clip_base.runtime.errors import InputError

Pixels = npt.NDArray[np.uint8]
# RGB pixels [H, W, 3], or an image in another of Pillow's modes.
Decoded = Pixels | Image.Image
Kind = TypeVar("Kind", bound=Decoded)

EXIF_ORIENTATION = 0x0112
_BACK = {6: 8, 8: 6}  # what undoes an orientation; the others undo themselves
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
notes_given: set[str] = set()  # in this process: one image in doubt is named, not each


def size_of(image: Decoded) -> tuple[int, int]:
    """Returns (height, width)."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def orientation_of(path: str | Path | Stored) -> tuple[int, bool]:
    """Returns an image's EXIF orientation, 1 to 8 (1: as stored), and whether decoding turns it already.

    Every decoder turns TIFF files, and no other.
    """
    try:
        if not may_be_turned(path):
            return 1, False
        with open_image_file(path) as image:
            found = image.getexif().get(EXIF_ORIENTATION, 1)
            return (found if found in range(1, 9) else 1), image.format == "TIFF"
    except Exception:  # a damaged note is no note: whether the pixels decode is seen elsewhere
        return 1, False


def upright_size(path: str | Path | Stored) -> tuple[int, int]:
    """Returns an image's (height, width) as people see it, from its file's header.

    Raises:
        InputError: the file is missing or its header cannot be read.
    """
    with open_image_file(path) as image:
        width, height = image.size
    sideways = orientation_of(path)[0] in (5, 6, 7, 8)
    return (width, height) if sideways else (height, width)


def turn(image: Kind, orientation: int) -> Kind:
    """Turns an image as EXIF's orientation 1 to 8 says (EXIF 2.3, section 4.6.4)."""
    if orientation == 1:
        return image
    if isinstance(image, Image.Image):
        return cast(Kind, image.transpose(_TURNS[orientation]))
    return cast(Kind, _turn_pixels(image, orientation))


def _turn_pixels(pixels: Pixels, orientation: int) -> Pixels:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    # numpy calls a line of single pixels contiguous even backwards, which torch does not take.
    return pixels.copy()


def turned_upright(image: Kind, path: str | Path | Stored) -> Kind:
    """Returns a decoded image as people see it.

    Args:
        image: what `decode` or `decode_stored` returns of the file.
        path: the image's file.
    """
    orientation, is_turned = orientation_of(path)
    return image if is_turned else turn(image, orientation)


def turned_as_annotated(image: Kind, path: str | Path | Stored, size: tuple[int, int] | None) -> Kind:
    """Returns a decoded image in the frame of its annotations.

    Args:
        image: what `decode` or `decode_stored` returns of the file.
        path: the image's file.
        size: (height, width) that the annotations state; None: they do not, so that it fits every frame.

    Raises:
        InputError: the image has that size in neither frame, so that boxes would not lie where they were
            drawn.
    """
    orientation, is_turned = orientation_of(path)
    if orientation == 1:
        frames = [image]
    elif is_turned:
        frames = [image, turn(image, _BACK.get(orientation, orientation))]
    else:
        frames = [turn(image, orientation), image]
    fitting = [frame for frame in frames if size is None or size_of(frame) == tuple(size)]
    if size is not None and not fitting:
        (height, width), (h, w) = size, size_of(image)
        raise InputError(
            f"image {path} is {w}x{h} pixels, its annotations say {width}x{height}; has it been resized?"
        )
    if len(fitting) > 1 and "undecided" not in notes_given:
        notes_given.add("undecided")
        fits = "its annotated size fits the stored pixels and the turned ones"
        why = "no size is annotated" if size is None else fits
        print(
            f"note: {path} has EXIF orientation {orientation}, and {why}: such images are rotated by their "
            "orientation, as viewers show them",
            file=sys.stderr,
        )
    return fitting[0]
