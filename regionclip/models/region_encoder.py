"""Regions to embeddings, over a CLIP vision tower: by RoIAlign on its map or by crops of the pixels."""

# B images, N regions in all, C channels of the map, s side of a region on the map, D embedding size
from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from clip_base.data.batch import ImageBatch
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.vit import VisionTransformer
from clip_base.runtime.errors import InputError
from regionclip.structures.regions import FeatureMaps, Regions, whole_images

MODES = ("roi_align", "crop", "dense")


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
    """

    def __init__(
        self,
        visual: ModifiedResNet | VisionTransformer,
        mode: str = "roi_align",
        context: float = 1.2,
        chunk: int = 256,
        scale: float = 1.0,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"region mode {mode!r} is not one of {', '.join(MODES)}")
        if mode == "roi_align" and not isinstance(visual, ModifiedResNet):
            raise InputError(
                "mode roi_align needs a ResNet tower (a ViT has no head for maps); use crop or dense"
            )
        if mode == "dense" and not isinstance(visual, VisionTransformer):
            raise InputError("mode dense needs a ViT tower; use roi_align or crop")
        if scale <= 0:
            raise InputError(f"the scale at which regions are seen must be above 0, found {scale}")
        self.visual, self.mode, self.context, self.chunk, self.scale = visual, mode, context, chunk, scale

    def __call__(self, images: ImageBatch, regions: Regions) -> Tensor:
        """Returns [N, D] unit-length embeddings of the regions."""
        if self.mode == "crop":
            return F.normalize(self._of_crops(images, regions).float(), dim=-1)
        if self.scale != 1:
            images, regions = _scaled(images, regions, self.scale)
        pixels = _to_whole_cells(images.pixels, self.visual.stride)
        if isinstance(self.visual, VisionTransformer):
            features = self.visual.dense(pixels).float()  # [B, D, h, w]
            pooled = pool_regions(features, regions.rois(), 4, 1 / self.visual.stride)  # [N, D, 4, 4]
            return F.normalize(pooled.mean((2, 3)), dim=-1)
        return F.normalize(self.encode_rois(self.visual.trunk(pixels), regions).float(), dim=-1)

    @classmethod
    def of_maps(
        cls, visual: ModifiedResNet | VisionTransformer, otherwise: Literal["crop", "dense"]
    ) -> RegionEncoder:
        """Returns an encoder that pools the tower's map; where its head pools none, one of another mode."""
        return cls(visual, "roi_align" if isinstance(visual, ModifiedResNet) else otherwise)

    @property
    def pools_maps(self) -> bool:
        """Whether regions are cut from the trunk's map, which proposals may share."""
        return self.mode == "roi_align"

    def feature_maps(self, images: ImageBatch, every_level: bool = False) -> FeatureMaps:
        """Returns the images with the trunk's maps; without maps where regions are embedded from pixels.

        Args:
            images: B images.
            every_level: whether to keep the maps of strides 4 and 8 too, for a network on the same trunk.
        """
        visual = self.visual
        if not self.pools_maps or not isinstance(visual, ModifiedResNet):
            return FeatureMaps(images)
        return FeatureMaps(images, tuple(visual.stages(images.pixels)[0 if every_level else -1 :]))

    def embed_maps(self, maps: FeatureMaps, regions: Regions) -> Tensor:
        """Returns [N, D] unit-length embeddings of regions, from the maps where there are any."""
        if not maps.levels:
            return self(maps.images, regions)
        return F.normalize(self.encode_rois(maps.regions_level, regions).float(), dim=-1)

    def roi_heads(self, maps: FeatureMaps, regions: Regions) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields embeddings [n, D], not normalized, and layer4's maps [n, C, s, s], for all regions in order.

        Raises:
            ValueError: regions are embedded from the pixels.
        """
        feature_map, visual = maps.regions_level, self.visual
        assert isinstance(visual, ModifiedResNet)
        for deep in self.layer4_features(feature_map, regions):
            yield visual.attnpool(deep).float(), deep

    def encode_image(self, images: ImageBatch) -> Tensor:
        """Returns [B, D] unit-length embeddings of whole images, their padding left out."""
        return self(images, whole_images(images))

    def encode_rois(self, feature_map: Tensor, regions: Regions) -> Tensor:
        """Returns [N, D], not normalized: regions of a ResNet trunk's map [B, C, H/16, W/16]."""
        visual = self.visual
        assert isinstance(visual, ModifiedResNet)
        return torch.cat([visual.attnpool(deep) for deep in self.layer4_features(feature_map, regions)])

    def layer4_features(self, feature_map: Tensor, regions: Regions) -> Iterator[Tensor]:
        """Yields [n, 2 · C, s / 2, s / 2], layer4's maps of the regions of a ResNet trunk's map, in order."""
        visual = self.visual
        assert isinstance(visual, ModifiedResNet)
        side = visual.region_size
        for rois in torch.split(regions.rois(), self.chunk):
            # [n, C, s, s]; with one sample a bin, a box that covers the image gives the image's own map back
            yield visual.layer4_map(pool_regions(feature_map, rois, side, 1 / visual.stride))

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


def pool_regions(feature_map: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """Returns the regions' own maps by RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3).

    What torchvision's `roi_align(…, sampling_ratio=0, aligned=True)` computes, of which this takes an eighth
    of the time on a processor when the map is channels-last and no gradient is asked for; else, and in graphs
    that are exported, it is called.

    Args:
        feature_map: [B, C, H, W].
        rois: [N, 5] float32: image index and box (x1, y1, x2, y2) in pixels.
        side: s.
        scale: cells of the map a pixel.

    Returns:
        [N, C, s, s], channels-last, of the map's type; computed in float32.
    """
    asked = feature_map.requires_grad and torch.is_grad_enabled()
    if asked or feature_map.device.type != "cpu" or torch.compiler.is_compiling():
        aligned: Tensor = roi_align(feature_map.float(), rois, side, scale, 0, aligned=True)
        return aligned.to(feature_map.dtype).contiguous(memory_format=torch.channels_last)
    height, width = feature_map.shape[-2:]
    edges = rois[:, 1:].float() * scale - 0.5
    down = bin_weights(edges[:, 1], edges[:, 3], side, height)  # [N, s, H]
    across = bin_weights(edges[:, 0], edges[:, 2], side, width)  # [N, s, W]
    cells = feature_map.permute(0, 2, 3, 1)  # [B, H, W, C]
    pooled = feature_map.new_empty(len(rois), side, side, feature_map.shape[1])  # [N, s, s, C]
    spans = zip(rois[:, 0].long().tolist(), _spans(down), _spans(across), strict=True)
    for region, (image, (top, bottom), (left, right)) in enumerate(spans):
        window = cells[image, top:bottom, left:right].float()  # [h, w, C], what the region looks at
        rows = (down[region, :, top:bottom] @ window.flatten(1)).view(side, *window.shape[1:])  # [s, w, C]
        pooled[region] = across[region, :, left:right] @ rows  # [s, s, C]
    return pooled.permute(0, 3, 1, 2)


def bin_weights(starts: Tensor, ends: Tensor, side: int, extent: int) -> Tensor:
    """Returns with which weight each bin of a region takes each cell, along one axis.

    A bin is the mean of its samples, one for each cell that it begins; a sample lies between two cells and
    takes of each what is left of a cell's width. Samples beyond the map take nothing.

    Args:
        starts: [N], where the regions begin, in cells.
        ends: [N], where they end.
        side: s, bins a region.
        extent: E, cells of the map along this axis.

    Returns:
        [N, s, E].
    """
    lengths = (ends - starts) / side  # of a bin
    samples = lengths.ceil().clamp(min=0)  # [N]
    number = torch.arange(max(int(samples.max()) if len(samples) else 0, 1))  # [k]
    offsets = (number + 0.5) / samples.clamp(min=1)[:, None]  # [N, k], in bins
    bins = torch.arange(side)[:, None] + offsets[:, None]  # [N, s, k]
    points = starts[:, None, None] + bins * lengths[:, None, None]
    taken = (points >= -1) & (points <= extent) & (number < samples[:, None, None])
    points = points.clamp(0, extent - 1)
    weights = 1 - (points[..., None] - torch.arange(extent)).abs()  # [N, s, k, E]
    weights = weights.clamp_(min=0).mul_(taken[..., None])
    return weights.sum(2) / samples.clamp(min=1)[:, None, None]


def _spans(weights: Tensor) -> list[tuple[int, int]]:
    """Returns for each region of weights [N, s, E] the first cell it takes and the one after the last."""
    taken = (weights > 0).any(1).byte()  # [N, E]
    first = taken.argmax(1)
    end = taken.shape[1] - taken.flip(1).argmax(1)
    return list(zip(first.tolist(), end.tolist(), strict=True))
