"""What a caller of the Python interface may give for images and boxes, and what is made of it."""

# N boxes
from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_base.images.inputs import ImageLike, image_files
from clip_base.images.samples import located
from clip_base.runtime.errors import InputError
from regionclip.structures.boxes import clip_boxes, valid_boxes

Images = str | Path | Iterable[ImageLike]  # a folder or pattern, a list, an iterator, a batch
Boxes = Tensor | npt.NDArray[Any] | Sequence[Sequence[float]]


def several_of(images: Any) -> Iterable[Any] | None:
    """Returns the images of a list, an iterator, a batch, a folder or a pattern; None for one image."""
    if isinstance(images, str | Path):
        is_one = not Path(images).is_dir() and (Path(images).exists() or not glob.has_magic(str(images)))
        return None if is_one else image_files([str(images)])
    if isinstance(images, Tensor | np.ndarray):
        return list(images) if images.ndim == 4 else None
    return images if isinstance(images, Iterable) else None


def required_several(images: Any) -> Iterable[Any]:
    """Returns the same; InputError for one image, or for a path that does not exist."""
    several = several_of(images)
    if several is None and isinstance(images, str | Path) and not located(images).exists():
        image_files([str(images)])  # which says that it does not exist
    if several is None:
        raise InputError(
            f"expected several images (a list, an iterator, a batch, a folder or a pattern), got "
            f"{described_image(images)}; call detect for one image"
        )
    return several


def described_image(images: Any) -> str:
    """Returns what was given, in a few words."""
    if isinstance(images, str | Path):
        return f"{'folder' if Path(images).is_dir() else 'image'} {images}"
    shape = f" {list(images.shape)}" if isinstance(images, Tensor | np.ndarray) else ""
    return f"a {type(images).__name__}{shape}"


def boxes_in(boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """Returns [N, 4] boxes cut at the edges of an image of (height, width), on the CPU.

    Raises:
        InputError: they are of another shape, or one covers no part of the image; it is named.
    """
    try:
        given = torch.as_tensor(boxes, dtype=torch.float32).cpu()
    except (TypeError, ValueError) as error:
        raise InputError(f"boxes must be [N, 4] numbers (x1, y1, x2, y2): {error}") from None
    if not given.numel():
        return given.reshape(0, 4)
    if given.ndim != 2 or given.shape[1] != 4:
        raise InputError(f"boxes must be [N, 4] (x1, y1, x2, y2) in pixels, got {list(given.shape)}")
    cut = clip_boxes(given, size)
    # A box without area that is in the image passes: rounding makes one of a detection now and then.
    missing = ~valid_boxes(cut) & (cut != given).any(1)
    swapped = (given[:, 2:] < given[:, :2]).any(1)
    bad = (missing | swapped | ~given.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        corners = ", ".join(f"{side:g}" for side in given[bad[0]].tolist())
        raise InputError(
            f"boxes[{bad[0]}] is ({corners}), which does not cover any part of the image of "
            f"{size[1]}x{size[0]} pixels; boxes are (x1, y1, x2, y2) with x1 < x2 and y1 < y2"
        )
    return cut
