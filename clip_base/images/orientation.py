"""The way an image lies: as its pixels are stored, or as its EXIF orientation shows it.

A camera may store an image on its side or upside down with a note that says how to turn it. Annotations made
from the raw pixels lie in the stored frame, those of tools that show images upright in the turned one. One
rule for every reader: the annotated size decides; where it fits both frames (180°, mirrored or square images)
or is not known, the image is turned.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_base.runtime.errors import InputError

Pixels = npt.NDArray[np.uint8]

EXIF_ORIENTATION = 0x0112
_BACK = {6: 8, 8: 6}  # what undoes an orientation; the others undo themselves
_told: set[str] = set()


def orientation_of(path: str | Path) -> tuple[int, bool]:
    """Returns an image's EXIF orientation, 1 to 8 (1: as stored), and whether decoding turns it already.

    Every decoder turns TIFF files, and no other.
    """
    try:
        with Image.open(path) as image:
            found = image.getexif().get(EXIF_ORIENTATION, 1)
            return (found if found in range(1, 9) else 1), image.format == "TIFF"
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return 1, False  # a damaged note is no note: whether the pixels decode is seen elsewhere


def turn(pixels: Pixels, orientation: int) -> Pixels:
    """Turns [H, W, 3] as EXIF's orientation 1 to 8 says (EXIF 2.3, section 4.6.4)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    # numpy calls a line of single pixels contiguous even backwards, which torch does not take.
    return pixels if orientation == 1 else pixels.copy()


def turned_upright(pixels: Pixels, path: str | Path) -> Pixels:
    """Returns decoded [H, W, 3] pixels as people see the image.

    Args:
        pixels: what `decode` returns of the file.
        path: the image's file.
    """
    orientation, is_turned = orientation_of(path)
    return pixels if is_turned else turn(pixels, orientation)


def turned_as_annotated(pixels: Pixels, path: str | Path, size: tuple[int, int]) -> Pixels:
    """Returns decoded [H, W, 3] pixels in the frame of their annotations.

    Args:
        pixels: what `decode` returns of the file.
        path: the image's file.
        size: (height, width) that the annotations state.

    Raises:
        InputError: the image has that size in neither frame, so that boxes would not lie where they were
            drawn.
    """
    orientation, is_turned = orientation_of(path)
    if orientation == 1:
        frames = [pixels]
    elif is_turned:
        frames = [pixels, turn(pixels, _BACK.get(orientation, orientation))]
    else:
        frames = [turn(pixels, orientation), pixels]
    fitting = [frame for frame in frames if frame.shape[:2] == tuple(size)]
    if not fitting:
        (height, width), (h, w) = size, pixels.shape[:2]
        raise InputError(
            f"image {path} is {w}x{h} pixels, its annotations say {width}x{height}; was it resized since?"
        )
    if len(fitting) > 1 and "undecided" not in _told:
        _told.add("undecided")
        print(
            f"note: {path} has EXIF orientation {orientation}, and its annotated size fits the stored pixels "
            "and the turned ones: such images are read upright, as they are shown",
            file=sys.stderr,
        )
    return fitting[0]
