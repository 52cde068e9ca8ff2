"""The proposer `grid`: boxes on a regular grid, without training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from regionclip.proposals.base import collect
from regionclip.structures.regions import ImageInfo, Regions

# The grid has no opinion on where objects are. With a score of 1 a product of objectness and name score is
# the name score alone, and no objectness threshold drops every box, as it could with a smaller constant.
SCORE = 1.0


@dataclass
class GridConfig:
    """Options of the proposer `grid`."""

    sizes: list[float] = option(
        [0.25, 0.4, 0.65, 1.0], "square roots of the boxes' areas, as fractions of the image's short side"
    )
    ratios: list[float] = option([0.5, 1.0, 2.0], "height of a box divided by its width")
    stride: float = option(0.5, "largest step between neighboring boxes, as a fraction of the box's side")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not self.sizes or min(self.sizes) <= 0 or max(self.sizes) > 4:
            raise InputError(f"sizes must be shares above 0 and at most 4, got {self.sizes}")
        if not self.ratios or min(self.ratios) <= 0:
            raise InputError(f"ratios must be above 0, got {self.ratios}")
        if not 0 < self.stride <= 1:
            raise InputError(f"stride must be above 0 and at most 1, or gaps remain; got {self.stride}")


class GridProposer:
    """Proposes a grid of boxes of several sizes and shapes, each with the score 1."""

    def __init__(self, config: GridConfig) -> None:
        self.config = config

    def __call__(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> Regions:
        """See `Proposer`. Boxes depend on the images' sizes only; `keys` are not needed."""
        sizes = [(int(height), int(width)) for height, width in images.sizes.tolist()]
        grids = {size: self.boxes(*size) for size in set(sizes)}
        boxes = [grids[size] for size in sizes]
        scores = [torch.full((len(rows),), SCORE) for rows in boxes]
        return collect(boxes, scores, images.pixels.device)

    def boxes(self, height: int, width: int) -> Tensor:
        """Returns [N, 4], the grid over an image of these pixels: each box inside it, none twice."""
        rows: dict[tuple[float, float, float, float], None] = {}
        for share in self.config.sizes:
            for ratio in self.config.ratios:
                side = share * min(height, width)
                box_height = min(side * math.sqrt(ratio), float(height))
                box_width = min(side / math.sqrt(ratio), float(width))
                for top in self._starts(height, box_height):
                    for left in self._starts(width, box_width):
                        rows[(left, top, left + box_width, top + box_height)] = None
        boxes = torch.tensor(list(rows), dtype=torch.float32).reshape(-1, 4)
        limits = torch.tensor([width, height, width, height], dtype=torch.float32)
        return torch.minimum(boxes, limits)  # [N, 4]; sums of floats may pass the edge by a rounding

    def _starts(self, extent: int, side: float) -> list[float]:
        """Returns evenly spread starts, the first at 0 and the last touching the far edge."""
        room = extent - side
        steps = math.ceil(room / (self.config.stride * side) - 1e-9)
        return [room * step / steps for step in range(steps + 1)] if steps else [0.0]
