"""Pictures in memory, PIL images, arrays and tensors of several forms, as [H, W, 3] uint8."""

# H, W height and width
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from torch import Tensor

from clip_base.data.images import Pixels
from clip_base.errors import InputError


def pixels_of(picture: Image.Image | npt.NDArray[Any] | Tensor) -> Pixels:
    """Returns a picture as [H, W, 3] uint8 RGB.

    Args:
        picture: a PIL image, turned as its EXIF note says; an array [H, W, 3] (RGB), [H, W, 4] (of which the
            transparency is dropped), [H, W, 1] or [H, W] (grey); or a tensor of these forms with the channels
            first. Numbers are uint8, or floating in [0, 1].

    Raises:
        InputError: an array or a tensor of another form, something else, or an image of more than 8 bits.
    """
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        # Pillow would cut off 16 bits at 255 and not scale them: such images are refused as arrays are.
        deep = picture.mode.startswith(("I", "F"))
        return _checked(np.array(picture if deep else picture.convert("RGB")), repr(picture))
    if isinstance(picture, Tensor):
        tensor = picture.detach().cpu()
        if tensor.ndim == 3:
            tensor = tensor.permute(1, 2, 0)
        whole = tensor.float() if tensor.is_floating_point() else tensor
        return _checked(whole.numpy(), f"a tensor {list(picture.shape)}")
    array = np.asarray(picture)
    known = isinstance(picture, np.ndarray)
    return _checked(array, f"an array {list(array.shape)}" if known else type(picture).__name__)


def _checked(array: npt.NDArray[Any], given: str) -> Pixels:
    """Returns [H, W, 3] uint8 of an array with the channels last; `given` names what the user gave."""
    colours = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if colours not in (1, 3, 4) or not array.size:
        raise InputError(
            f"a picture is a path, a PIL image, an array [H, W, 3] or a tensor [3, H, W]; got {given}"
        )
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise InputError(
                f"a floating picture lies in [0, 1], got {low:g}…{high:g}; was it normalised? Give it as it "
                "was before, or, where 255 is white, divided by 255"
            )
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"a picture's pixels are uint8, or floating in [0, 1]; got {array.dtype}")
    array = array.reshape(*array.shape[:2], colours)
    return np.ascontiguousarray(array[..., :3] if colours > 1 else array.repeat(3, axis=2))
