"""Regions of a batch and the input of a training step, validated on construction."""

# B images, N regions in all, K concepts kept for a region, T token positions
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from regionclip.structures.checks import check_tensor, rows


@dataclass(frozen=True)
class Regions:
    """Boxes in the images of a batch, flat: an image without regions needs no special case.

    Attributes:
        boxes: [N, 4] float32 (x1, y1, x2, y2) in pixels of the batch's frame.
        image_index: [N] int64, which image of the batch each box is in.
        scores: [N] float, or None.
        labels: [N] int64, or None.
        concept_ids: [N, K] int64 rows of a vocabulary, or None.
        concept_probs: [N, K] float probabilities of those concepts, or None.
        logits: [N] float, what `scores` are the sigmoid of, or None.
    """

    boxes: Tensor
    image_index: Tensor
    scores: Tensor | None = None
    labels: Tensor | None = None
    concept_ids: Tensor | None = None
    concept_probs: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("boxes", self.boxes, (None, 4), torch.float32)
        count = len(self.boxes)
        check_tensor("image_index", self.image_index, (count,), torch.int64)
        if self.scores is not None:
            check_tensor("scores", self.scores, (count,))
        if self.logits is not None:
            check_tensor("logits", self.logits, (count,))
        if self.labels is not None:
            check_tensor("labels", self.labels, (count,), torch.int64)
        if self.concept_ids is not None:
            check_tensor("concept_ids", self.concept_ids, (count, None), torch.int64)
        if self.concept_probs is not None:
            if self.concept_ids is None:
                raise ValueError("concept_probs need concept_ids")
            check_tensor("concept_probs", self.concept_probs, (count, self.concept_ids.shape[1]))

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Tensor | slice | int) -> Regions:
        """Returns the regions that a mask [N] bool, indices [M] int64, a slice or one number picks."""
        picked = rows(which, len(self))
        return self._each(lambda column: column[picked])

    def to(self, device: torch.device | str) -> Regions:
        """Returns the same regions on `device`."""
        return self._each(lambda column: column.to(device, non_blocking=True))

    def rois(self) -> Tensor:
        """Returns [N, 5] float32 (image index, x1, y1, x2, y2), as `torchvision.ops.roi_align` takes them."""
        return torch.cat([self.image_index[:, None].to(self.boxes.dtype), self.boxes], dim=1)

    def of_image(self, index: int) -> Regions:
        """Returns the regions that are in image `index` of the batch; their `image_index` stays as it is."""
        return self[self.image_index == index]

    @classmethod
    def cat(cls, parts: Sequence[Regions]) -> Regions:
        """Joins regions of one batch; none at all give an empty one.

        Raises:
            ValueError: some parts carry a column (scores, say) that others lack.
        """
        if not parts:
            return cls(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        columns: dict[str, Tensor | None] = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            missing = sum(value is None for value in values)
            if missing not in (0, len(values)):
                raise ValueError(
                    f"{missing} of {len(values)} parts have no {field.name}; give it for all or none"
                )
            columns[field.name] = None if missing else torch.cat(values)
        return cls(**columns)  # type: ignore[arg-type]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Regions:
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: None if column is None else change(column) for name, column in columns.items()}
        return Regions(**changed)  # type: ignore[arg-type]


def whole_images(images: ImageBatch) -> Regions:
    """Returns one region an image, which covers the image and not its padding; scores, labels: None."""
    sizes = images.sizes.to(torch.float32)  # [B, 2] height, width
    boxes = torch.cat([torch.zeros_like(sizes), sizes.flip(-1)], dim=1)  # [B, 4]
    return Regions(boxes, torch.arange(len(images), device=sizes.device))


@dataclass(frozen=True)
class FeatureMaps:
    """Images with the maps that a tower's trunk made of them, for proposals and embeddings in one pass.

    Attributes:
        images: B images.
        levels: [B, C, H / stride, W / stride] each, the regions' own last; empty where regions are embedded
            from the pixels.
    """

    images: ImageBatch
    levels: tuple[Tensor, ...] = ()

    @property
    def regions_level(self) -> Tensor:
        """The map that regions are cut from.

        Raises:
            ValueError: there are no maps.
        """
        if not self.levels:
            raise ValueError("regions of this tower are embedded from pixels; it has no feature maps")
        return self.levels[-1]


@dataclass(frozen=True)
class RegionBatch:
    """Images, regions in them and, for image-text losses, one caption an image.

    Attributes:
        images: B images.
        regions: N regions whose `image_index` is below B.
        tokens: [B, T] int64 token ids, zeros where an image has no caption, or None.
    """

    images: ImageBatch
    regions: Regions
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            check_tensor("tokens", self.tokens, (len(self.images), None))
        # Looking at values would make the host wait for a GPU; a batch is made on the CPU, and checked there.
        index = self.regions.image_index
        if (
            index.device.type == "cpu"
            and len(index)
            and not 0 <= int(index.min()) <= int(index.max()) < len(self.images)
        ):
            raise ValueError(
                f"image_index must be in 0…{len(self.images) - 1}, got {int(index.min())}…{int(index.max())}"
            )

    def to(self, device: torch.device | str) -> RegionBatch:
        """Returns the same batch on `device`."""
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=True)
        return RegionBatch(self.images.to(device), self.regions.to(device), tokens)


@dataclass(frozen=True)
class ImageInfo:
    """Says which image a slot of a batch holds, and how large it is on disk.

    Attributes:
        image_id: the image's id in its dataset.
        height: of the original image, pixels.
        width: of the original image, pixels.
        file_name: as much of its path as is known; "": an image in memory.
        key: what identifies it in its source where its id is only a number, such as a tar's `__key__`.
    """

    image_id: int
    height: int
    width: int
    file_name: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        """Checks the size."""
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"image {self.image_id} has size {self.height}x{self.width}, expected at least 1x1"
            )
