"""Regions of images as another package's tower sees them: crops, or the patches under a box.

Unlike the towers of this package these take images of one square size, so crops are resized to it as their
own preprocessing would, and mode "dense" shows the tower the whole image, resized to that square.
"""

# B images, N regions in all, n of a chunk, D embedding size, S side of the tower's input, g side of its grid
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import DEVIATION, MEAN
from clip_base.runtime.errors import InputError
from regionclip.models.pooling import pool_regions
from regionclip.models.region_encoder import square_rois
from regionclip.models.teachers.base import RegionView, TeacherModel
from regionclip.structures.regions import Regions

CHUNK = 256  # crops embedded at once, to bound memory
POOLED = 4  # samples along each side of a box on the grid of patches


class TeacherRegions:
    """Embeds regions with a teacher of any package; see `RegionEmbedder`.

    Args:
        teacher: its images are square.
        view: mode "crop" or "dense"; crops take no scale, and dense shows the image at the tower's own size.

    Raises:
        InputError: another mode, or dense for a tower without patch embeddings.
    """

    def __init__(self, teacher: TeacherModel, view: RegionView) -> None:
        if view.mode not in ("crop", "dense"):
            raise InputError(
                f"teacher={view.mode} is for a ResNet of this package (backend.name=clip); use crop"
                + (" or dense" if teacher.stride else "")
            )
        if view.mode == "dense" and not teacher.stride:
            raise InputError(
                "teacher=dense needs a tower with patch embeddings, which this one does not have; use crop"
            )
        if view.scale != 1:
            raise InputError(
                f"teacher_scale={view.scale:g} is for teachers of this package: another one sees images "
                f"at its own size, {self._size(teacher)}; omit it"
            )
        self.visual, self.view = teacher, view

    @staticmethod
    def _size(teacher: TeacherModel) -> str:
        return f"{teacher.resolution}x{teacher.resolution} pixels"

    def __call__(self, images: ImageBatch, regions: Regions) -> Tensor:
        """Returns [N, D] unit-length embeddings of the regions."""
        found = self._dense(images, regions) if self.view.mode == "dense" else self._crops(images, regions)
        return F.normalize(found.float(), dim=-1)

    def _crops(self, images: ImageBatch, regions: Regions) -> Tensor:
        parts = []
        for rois in torch.split(square_rois(regions, self.view.context), CHUNK):
            crops = [self._resized(self._cut(images, roi)) for roi in rois]  # [1, 3, S, S] each
            if crops:
                parts.append(self.visual.encode_image(self._as_its_own(torch.cat(crops))))
        return torch.cat(parts) if parts else self._nothing(images)

    def _cut(self, images: ImageBatch, roi: Tensor) -> Tensor:
        """Returns [1, 3, k, k], the pixels of a square [5] (image, box), k its side in whole pixels."""
        image, side = int(roi[0]), max(round(float(roi[3] - roi[1])), 1)
        height, width = images.sizes[image].tolist()
        own = torch.cat([roi.new_zeros(1), roi[1:]])[None]
        pixels = images.pixels[image : image + 1, :, :height, :width].float()
        # A sample per pixel: a square of whole pixels is cut out as it is.
        cut: Tensor = roi_align(pixels, own, side, 1.0, 1, aligned=True)
        return cut

    def _dense(self, images: ImageBatch, regions: Regions) -> Tensor:
        if not len(regions):
            return self._nothing(images)
        whole = [
            self._resized(images.pixels[slot : slot + 1, :, :height, :width].float())
            for slot, (height, width) in enumerate(images.sizes.tolist())
        ]
        maps = self.visual.encode_patches(self._as_its_own(torch.cat(whole))).float()  # [B, D, g, g]
        sizes = images.sizes[regions.image_index].flip(1).to(regions.boxes.dtype)  # [N, 2] width, height
        boxes = regions.boxes / sizes.repeat(1, 2) * maps.shape[-1]  # in cells
        rois = Regions(boxes, regions.image_index).rois()
        return pool_regions(maps, rois, POOLED, 1.0).mean((2, 3))

    def _resized(self, pixels: Tensor) -> Tensor:
        """Returns [1, 3, S, S] of [1, 3, h, w]."""
        side = self.visual.resolution
        if pixels.shape[-2:] == (side, side):
            return pixels
        return F.interpolate(pixels, (side, side), mode=self.visual.interpolation, antialias=True)

    def _as_its_own(self, pixels: Tensor) -> Tensor:
        """Returns pixels that are normalized as images here are, normalized as the tower's own are."""
        mean, deviation, own_mean, own_deviation = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (MEAN, DEVIATION, self.visual.mean, self.visual.deviation)
        )
        # What a bicubic filter overshoots, an image file cannot hold.
        colors = (pixels * deviation + mean).clamp(0, 1)
        return (colors - own_mean) / own_deviation

    def _nothing(self, images: ImageBatch) -> Tensor:
        tokens = self.visual.tokenize(["a"], True).to(images.pixels.device)
        return images.pixels.new_zeros(0, self.visual.encode_text(tokens).shape[1])
