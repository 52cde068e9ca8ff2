"""The proposer `selective_search` (Uijlings et al., IJCV 2013): boxes by color and texture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import DEVIATION, MEAN, Pixels
from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from regionclip.proposals.base import collect
from regionclip.structures.regions import ImageInfo, Regions

# The search orders its boxes but does not say how sure it is of any: see `grid` on why that is 1.
SCORE = 1.0


@dataclass
class SelectiveSearchConfig:
    """Options of the proposer `selective_search`."""

    mode: str = option(
        "fast",
        "fast: two color spaces; quality: five, three times the boxes and the time",
        choices=("fast", "quality"),
    )
    side: int = option(320, "long side in pixels to which images are reduced; 0: not reduced")
    min_size: float = option(8.0, "minimum width and height of boxes, in pixels of the batch")
    limit: int = option(1000, "maximum number of boxes per image")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.side < 0 or self.min_size < 0 or self.limit < 1:
            raise InputError(
                f"side and min_size must be at least 0, limit at least 1; got {self.side}, "
                f"{self.min_size:g}, {self.limit}"
            )


class SelectiveSearchProposer:
    """Proposes the boxes of OpenCV's selective search, each with the score 1.

    The boxes come in the paper's order, large before small with chance mixed in (section 3.3), so that a
    limit keeps all sizes. Chance depends on the image's id alone; OpenCV's own order changes from call to
    call.
    """

    def __init__(self, config: SelectiveSearchConfig) -> None:
        self.config = config
        # None without OpenCV's contributed modules; its type stubs never know it.
        self._modules: Any = getattr(cv2, "ximgproc", None)
        if self._modules is None:
            raise InputError(
                "selective_search needs OpenCV's contrib modules, which this OpenCV lacks; run pip install "
                "'regionclip[selective-search]' (if this does not help, pip install --force-reinstall "
                "--no-deps opencv-contrib-python-headless: opencv-python-headless overwrote it)"
            )

    def __call__(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> Regions:
        """See `Proposer`. Of `keys` only the ids are used, to draw the order."""
        boxes = []
        for pixels, (height, width), key in zip(images.pixels, images.sizes.tolist(), keys, strict=True):
            found = self._boxes(_bytes(pixels[:, :height, :width]))
            boxes.append(found[_order(found, key.image_id)][: self.config.limit])
        return collect(boxes, [torch.full((len(rows),), SCORE) for rows in boxes], images.pixels.device)

    def _boxes(self, image: Pixels) -> Tensor:
        """Returns [N, 4] boxes in an [h, w, 3] BGR image, none twice, by their corners."""
        height, width = image.shape[:2]
        scale = min(self.config.side / max(height, width), 1.0) if self.config.side else 1.0
        h, w = max(round(height * scale), 1), max(round(width * scale), 1)
        if (h, w) != (height, width):
            image = np.asarray(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA), np.uint8)
        search = self._modules.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(image)
        if self.config.mode == "fast":
            search.switchToSelectiveSearchFast()
        else:
            search.switchToSelectiveSearchQuality()
        found = np.unique(np.asarray(search.process(), dtype=np.float32).reshape(-1, 4), axis=0)
        found[:, 2:] += found[:, :2]  # x, y, width, height as OpenCV gives them
        boxes = torch.from_numpy(found) * torch.tensor([width / w, height / h] * 2)
        sides = boxes[:, 2:] - boxes[:, :2]
        return boxes[(sides >= self.config.min_size).all(1)].contiguous()


def _bytes(pixels: Tensor) -> Pixels:
    """Returns [h, w, 3] BGR in 0…255 of [3, h, w] pixels normalized as for CLIP."""
    mean, deviation = (pixels.new_tensor(values)[:, None, None] * 255 for values in (MEAN, DEVIATION))
    shown = (pixels * deviation + mean).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(shown.flip(0).permute(1, 2, 0).cpu().numpy())


def _order(boxes: Tensor, image_id: int) -> Tensor:
    """Returns indices: the rank of a box by falling area, times a number drawn for it, rises."""
    sides = boxes[:, 2:] - boxes[:, :2]
    largest = sides.prod(1).argsort(descending=True, stable=True)
    draws = torch.rand(len(boxes), generator=torch.Generator().manual_seed(image_id % 2**63))
    return largest[(draws * torch.arange(1, len(boxes) + 1)).argsort(stable=True)]
