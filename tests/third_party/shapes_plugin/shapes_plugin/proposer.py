"""A proposer that believes things to be in the middle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clip_base.data.batch import ImageBatch
from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from regionclip.structures.regions import ImageInfo, Regions


@dataclass
class CenterConfig:
    """Options of the proposer `center`."""

    share: float = option(0.5, "side of the box as a share of the image's")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share must be above 0 and at most 1, found {self.share}")


class CenterProposer:
    """Proposes one box in the middle of each image."""

    def __init__(self, config: CenterConfig) -> None:
        self.config = config

    def __call__(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> Regions:
        """Returns one box per image, in the batch's frame."""
        heights, widths = images.sizes.float().unbind(1)
        near, far = (1 - self.config.share) / 2, (1 + self.config.share) / 2
        boxes = torch.stack([near * widths, near * heights, far * widths, far * heights], dim=1)
        return Regions(
            boxes=boxes, image_index=torch.arange(len(images)), scores=torch.full((len(images),), 0.5)
        )
