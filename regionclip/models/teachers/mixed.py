"""Large regions by RoIAlign on the image's map, small ones by crops: each where it is the better view.

A region of the map costs little, but one that is small there has hardly a cell of its own; a crop shows it at
the tower's full resolution, for a pass of the tower.
"""

# N regions in all, D embedding size
from __future__ import annotations

import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.vit import VisionTransformer
from clip_base.runtime.errors import InputError
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.teachers.base import RegionView
from regionclip.structures.regions import Regions

MODE = "mixed"


class MixedRegions:
    """Embeds regions by RoIAlign, those below a size by crops; see `RegionEmbedder`.

    Args:
        visual: a ResNet tower.
        view: its context is the crops', its scale and region head the map's, `crop_below` the size.

    Raises:
        InputError: the tower is a ViT, or the size is not above 0.
    """

    def __init__(self, visual: ModifiedResNet | VisionTransformer, view: RegionView) -> None:
        if view.crop_below <= 0:
            raise InputError(f"crop_below must be above 0 pixels, found {view.crop_below:g}")
        if isinstance(visual, VisionTransformer):
            raise InputError("teacher=mixed needs a ResNet tower, whose map it pools; use crop or dense")
        self.visual, self.view = visual, view
        self.crops = RegionEncoder(visual, "crop", view.context)
        self.maps = RegionEncoder(visual, "roi_align", scale=view.scale, region_head=view.region_head)

    def __call__(self, images: ImageBatch, regions: Regions) -> Tensor:
        """Returns [N, D] unit-length embeddings of the regions."""
        sides = (regions.boxes[:, 2:] - regions.boxes[:, :2]).amax(
            1
        ) * self.view.scale  # as the map sees them
        small = sides < self.view.crop_below
        found = regions.boxes.new_zeros(len(regions), self.visual.embed_dim)
        for which, embed in ((small, self.crops), (~small, self.maps)):
            rows = torch.nonzero(which).flatten()
            if len(rows):
                found[rows] = embed(images, Regions(regions.boxes[rows], regions.image_index[rows])).float()
        return found
