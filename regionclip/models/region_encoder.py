"""The region encoder: embeds regions with a CLIP vision tower, by RoIAlign on its map or by crops."""

# B images, N regions in all, C channels of the map, s side of a region on the map, D embedding size
from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from clip_base.data.batch import ImageBatch
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.vit import VisionTransformer
from clip_base.runtime.errors import InputError
from regionclip.models.pooling import pool_regions
from regionclip.models.region_heads import (
    HEADS,
    REGION_HEADS,
    PerRegionHead,
    RegionHead,
    RegionMaps,
    SharedHead,
)
from regionclip.structures.regions import FeatureMaps, Regions, whole_images

MODES = ("roi_align", "crop", "dense")
BoxDeltas = Callable[[Tensor, RegionMaps], Tensor]


class RegionEncoder:
    """Embeds regions with a CLIP vision tower.

    It has no weights of its own and is no module, so that a model that holds it lists its tower's weights
    once.

    Args:
        visual: the vision tower.
        mode: "roi_align" pools the trunk's map and runs the head on it (ResNets; arXiv 2112.09106, section
            3.1); "crop" cuts square crops out of the pixels and embeds each as an image of its own; "dense"
            averages the projected patch tokens under a box (ViTs).
        context: crop mode: side of the crop as a multiple of the box's longer side.
        chunk: crops or regions embedded at once, to bound memory.
        scale: factor on the images' size before they are embedded, so that a tower sees things as large as
            it did in training; crops have their own size and take none.
        region_head: mode roi_align: "per_region" runs layer4 on each region, "shared" once on the map; see
            `regionclip.models.region_heads`.
    """

    def __init__(
        self,
        visual: ModifiedResNet | VisionTransformer,
        mode: str = "roi_align",
        context: float = 1.2,
        chunk: int = 256,
        scale: float = 1.0,
        region_head: str = PerRegionHead.kind,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"region mode {mode!r} is not one of {', '.join(MODES)}")
        if mode == "roi_align" and not isinstance(visual, ModifiedResNet):
            raise InputError(
                "mode roi_align needs a ResNet tower (a ViT has no head for feature maps); use crop or dense"
            )
        if mode == "dense" and not isinstance(visual, VisionTransformer):
            raise InputError("mode dense needs a ViT tower; use roi_align or crop")
        if scale <= 0:
            raise InputError(f"the scale of the teacher must be above 0, found {scale}")
        if region_head not in REGION_HEADS:
            raise InputError(f"region_head={region_head} is not one of {', '.join(REGION_HEADS)}")
        if region_head != PerRegionHead.kind and mode != "roi_align":
            raise InputError(
                f"region_head={region_head} is for regions of a ResNet's map (roi_align), not for mode {mode}"
            )
        self.visual, self.mode, self.context, self.chunk, self.scale = visual, mode, context, chunk, scale
        self.region_head = region_head
        self._stages: Callable[[Tensor], list[Tensor]] | None = None
        if isinstance(visual, ModifiedResNet):
            self._stages = visual.stages
        self._head: RegionHead | None = None
        if mode == "roi_align" and isinstance(visual, ModifiedResNet):
            self._head = HEADS[region_head](visual, chunk)

    def __call__(self, images: ImageBatch, regions: Regions) -> Tensor:
        """Returns [N, D] unit-length embeddings of the regions."""
        if self.mode == "crop":
            return F.normalize(self._of_crops(images, regions).float(), dim=-1)
        if self.scale != 1:
            images, regions = _scaled(images, regions, self.scale)
        pixels = _to_whole_cells(images.pixels, self._head.cell if self._head else self.visual.stride)
        if isinstance(self.visual, VisionTransformer):
            features = self.visual.dense(pixels).float()  # [B, D, h, w]
            pooled = pool_regions(features, regions.rois(), 4, 1 / self.visual.stride)  # [N, D, 4, 4]
            return F.normalize(pooled.mean((2, 3)), dim=-1)
        assert self._stages is not None
        return F.normalize(self.encode_rois(self._stages(pixels)[-1], regions).float(), dim=-1)

    @classmethod
    def of_maps(
        cls,
        visual: ModifiedResNet | VisionTransformer,
        otherwise: Literal["crop", "dense"],
        region_head: str = PerRegionHead.kind,
    ) -> RegionEncoder:
        """Returns an encoder that pools the tower's map; where its head pools none, one of another mode."""
        mode = "roi_align" if isinstance(visual, ModifiedResNet) else otherwise
        return cls(visual, mode, region_head=region_head)

    @property
    def pools_maps(self) -> bool:
        """Whether regions are cut from the trunk's map, which proposals may share."""
        return self.mode == "roi_align"

    def check_padding(self, multiple: int) -> None:
        """Raises an InputError unless maps of images padded to multiples of so many pixels cover them."""
        if self.region_head != PerRegionHead.kind and self._head and multiple % self._head.cell:
            raise InputError(
                f"region_head={self.region_head} needs images padded to multiples of {self._head.cell} "
                f"pixels; set resize.multiple={self._head.cell}, found {multiple}"
            )

    def feature_maps(self, images: ImageBatch, every_level: bool = False) -> FeatureMaps:
        """Returns the images with the trunk's maps; without maps where regions are embedded from pixels.

        Args:
            images: B images.
            every_level: whether to keep the maps of strides 4 and 8 too, for a network on the same trunk.
        """
        if not self.pools_maps or self._stages is None:
            return FeatureMaps(images)
        return FeatureMaps(images, tuple(self._stages(images.pixels)[0 if every_level else -1 :]))

    def compile(self) -> None:
        """Compiles a ResNet's trunk with torch.compile; its weights must not change afterwards.

        Each size of batches is compiled for itself, which takes up to a minute; after eight sizes PyTorch
        continues without compiling.

        Raises:
            InputError: the tower is no ResNet.
        """
        if not isinstance(self.visual, ModifiedResNet):
            raise InputError("compile=true is for ResNet towers; this one is a ViT")
        # Frozen weights are reordered once for the processor, which needs sizes that are known.
        self._stages = torch.compile(self.visual.stages, dynamic=False, options={"freezing": True})

    def embed_maps(self, maps: FeatureMaps, regions: Regions) -> Tensor:
        """Returns [N, D] unit-length embeddings of regions, from the maps where there are any."""
        if not maps.levels:
            return self(maps.images, regions)
        return F.normalize(self.encode_rois(maps.regions_level, regions).float(), dim=-1)

    def roi_heads(
        self, maps: FeatureMaps, regions: Regions, box_head: BoxDeltas | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns regions' embeddings [N, D], not normalized, and what a box head makes of them, [N, 4].

        Args:
            maps: of the images that the regions are in.
            regions: N regions.
            box_head: takes embeddings [n, D] and layer4's maps of the same regions, and returns [n, 4]; None:
                the second is None.

        Raises:
            ValueError: regions are embedded from the pixels.
        """
        return self._embed(maps.regions_level, regions, box_head)

    def rough_embeddings(self, maps: FeatureMaps, regions: Regions) -> Tensor:
        """Returns [N, D], not normalized: what the shared head makes of regions, to rank them cheaply."""
        visual, feature_map = self.visual, maps.regions_level
        assert isinstance(visual, ModifiedResNet)
        height, width = feature_map.shape[-2:]
        if height % 2 or width % 2:  # layer4 would drop the last row or column
            feature_map = F.pad(feature_map, (0, width % 2, 0, height % 2), mode="replicate")
        shared = RegionEncoder(visual, "roi_align", chunk=self.chunk, region_head=SharedHead.kind)
        return shared.encode_rois(feature_map, regions)

    def encode_image(self, images: ImageBatch) -> Tensor:
        """Returns [B, D] unit-length embeddings of whole images, their padding left out."""
        return self(images, whole_images(images))

    def encode_rois(self, feature_map: Tensor, regions: Regions) -> Tensor:
        """Returns [N, D], not normalized: regions of a ResNet trunk's map [B, C, H/16, W/16]."""
        return self._embed(feature_map, regions)[0]

    def _embed(
        self, feature_map: Tensor, regions: Regions, box_head: BoxDeltas | None = None
    ) -> tuple[Tensor, Tensor | None]:
        assert self._head is not None
        order, embeddings, deltas = [], [], []
        for which, found, layer4 in self._head(feature_map, regions):
            order.append(which)
            embeddings.append(found.float())
            if box_head is not None:
                deltas.append(box_head(embeddings[-1], layer4).float())
        places = torch.cat(order)
        return _in_order(embeddings, places), _in_order(deltas, places) if box_head is not None else None

    def _of_crops(self, images: ImageBatch, regions: Regions) -> Tensor:
        side = self.visual.resolution
        parts = []
        for rois in torch.split(square_rois(regions, self.context), self.chunk):
            # [n, 3, side, side]; a sample a pixel: a crop of the tower's size is the image's own pixels
            crops = roi_align(images.pixels.float(), rois, side, 1.0, 0, aligned=True)
            parts.append(self.visual(crops.contiguous(memory_format=torch.channels_last)))
        return torch.cat(parts) if parts else images.pixels.new_zeros(0, self.visual.embed_dim)


def _to_whole_cells(pixels: Tensor, stride: int) -> Tensor:
    """Pads pixels [B, 3, H, W] on the right and below, so that the map's cells cover all of them.

    A tower drops what is left over beside the last whole cell; a region there would be taken for empty.
    """
    height, width = pixels.shape[-2:]
    if height % stride == width % stride == 0:
        return pixels
    return F.pad(pixels, (0, -width % stride, 0, -height % stride))


def _scaled(images: ImageBatch, regions: Regions, scale: float) -> tuple[ImageBatch, Regions]:
    """Returns the images at another size, rounded to whole pixels, and the regions in them."""
    height, width = images.pixels.shape[-2:]
    h, w = max(round(height * scale), 16), max(round(width * scale), 16)
    pixels = F.interpolate(images.pixels.float(), (h, w), mode="bilinear", antialias=True)
    factors = torch.tensor([w / width, h / height], device=regions.boxes.device)
    sizes = (images.sizes * factors.flip(0)).round().long()
    boxes = regions.boxes * factors.repeat(2)
    return ImageBatch(pixels, sizes), Regions(boxes, regions.image_index)


def square_rois(regions: Regions, context: float) -> Tensor:
    """Returns [N, 5] (image index, box): squares around the regions, `context` times their longer side."""
    x1, y1, x2, y2 = regions.boxes.unbind(1)
    half = torch.maximum(x2 - x1, y2 - y1) * context / 2
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return torch.stack([regions.image_index.to(x.dtype), x - half, y - half, x + half, y + half], 1)


def _in_order(parts: list[Tensor], places: Tensor) -> Tensor:
    """Joins parts of all rows, whose places are given."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)[places.argsort()]
