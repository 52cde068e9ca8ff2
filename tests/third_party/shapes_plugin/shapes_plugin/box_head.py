"""A box head that reads both the embedding and the mean of the map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regionclip.models.box_head import BoxHead, BoxHeadConfig, begin_still
from regionclip.models.region_heads import RegionMaps


class MeanBoxes(BoxHead):
    """Linear in a region's embedding and the mean of its map."""

    def __init__(self, config: BoxHeadConfig) -> None:
        super().__init__()
        self.both = nn.Linear(config.embed_dim + config.channels, 4)
        begin_still(self.both)

    def deltas(self, embeddings: Tensor, maps: RegionMaps) -> Tensor:
        """See `BoxHead`."""
        moved: Tensor = self.both(torch.cat([embeddings, maps.whole().mean((2, 3))], 1))
        return moved
