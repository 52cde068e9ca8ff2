"""Regions of a batch, what a training step receives, and the detections of one image: checked when made."""

# B images, N regions in all, K concepts kept for a region, T token positions
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_base.batch import ImageBatch
from regionclip.boxes import xywh_to_xyxy, xyxy_to_xywh


def _check(name: str, value: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> None:
    """Raises a ValueError that states the expected and the found shape and type; None means any."""
    fits = value.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must be [{wanted}], got {list(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {value.dtype}")


@dataclass(frozen=True)
class Regions:
    """Boxes in the images of a batch, flat: an image without regions needs no special case.

    Attributes:
        boxes: [N, 4] float32 (x1, y1, x2, y2) in pixels of the batch's frame.
        image_index: [N] int64, which image of the batch each box lies in.
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
        _check("boxes", self.boxes, (None, 4), torch.float32)
        count = len(self.boxes)
        _check("image_index", self.image_index, (count,), torch.int64)
        if self.scores is not None:
            _check("scores", self.scores, (count,))
        if self.logits is not None:
            _check("logits", self.logits, (count,))
        if self.labels is not None:
            _check("labels", self.labels, (count,), torch.int64)
        if self.concept_ids is not None:
            _check("concept_ids", self.concept_ids, (count, None), torch.int64)
        if self.concept_probs is not None:
            if self.concept_ids is None:
                raise ValueError(
                    "concept_probs without concept_ids: nothing says whose probabilities they are"
                )
            _check("concept_probs", self.concept_probs, (count, self.concept_ids.shape[1]))

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Tensor | slice | int) -> Regions:
        """Returns the regions that a mask [N] bool, indices [M] int64, a slice or one number picks."""
        if isinstance(which, int):
            which = slice(which, which + 1 or None)
        return self._each(lambda column: column[which])

    def to(self, device: torch.device | str) -> Regions:
        """Returns the same regions on `device`."""
        return self._each(lambda column: column.to(device, non_blocking=True))

    def rois(self) -> Tensor:
        """Returns [N, 5] float32 (image index, x1, y1, x2, y2), as `torchvision.ops.roi_align` takes them."""
        return torch.cat([self.image_index[:, None].to(self.boxes.dtype), self.boxes], dim=1)

    def of_image(self, index: int) -> Regions:
        """Returns the regions that lie in image `index` of the batch; their `image_index` stays as it is."""
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
                    f"{missing} of {len(values)} parts have no {field.name}; give it to all or none"
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
            _check("tokens", self.tokens, (len(self.images), None))
        # Looking at values would make the host wait for a GPU; a batch is made on the CPU, and checked there.
        index = self.regions.image_index
        if (
            index.device.type == "cpu"
            and len(index)
            and not 0 <= int(index.min()) <= int(index.max()) < len(self.images)
        ):
            raise ValueError(
                f"image_index must lie in 0…{len(self.images) - 1}, got {int(index.min())}…{int(index.max())}"
            )

    def to(self, device: torch.device | str) -> RegionBatch:
        """Returns the same batch on `device`."""
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=True)
        return RegionBatch(self.images.to(device), self.regions.to(device), tokens)


@dataclass(frozen=True, repr=False)
class Detections:
    """What was found in one image.

    Attributes:
        boxes: [N, 4] float32 (x1, y1, x2, y2) in pixels of the original image.
        scores: [N] float32 in [0, 1].
        labels: [N] int64 into `names`.
        names: the vocabulary's names.
        size: (height, width) of the original image, in pixels.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        _check("boxes", self.boxes, (None, 4), torch.float32)
        count = len(self.boxes)
        _check("scores", self.scores, (count,), torch.float32)
        _check("labels", self.labels, (count,), torch.int64)
        if not isinstance(self.names, tuple):
            raise ValueError(f"names must be a tuple of strings, got {type(self.names).__name__}")
        if not count:
            return
        if not bool(self.boxes.isfinite().all()):
            raise ValueError("boxes hold NaN or infinite corners")
        # Written so that NaN fails too.
        if not bool(((self.scores >= 0) & (self.scores <= 1)).all()):
            raise ValueError(f"scores must lie in [0, 1], got {_span(self.scores)}")
        if not bool(((self.labels >= 0) & (self.labels < len(self.names))).all()):
            raise ValueError(f"labels must lie in 0…{len(self.names) - 1}, got {_span(self.labels)}")

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Tensor | slice | int) -> Detections:
        """Returns the detections that a mask [N] bool, indices [M] int64, a slice or one number picks."""
        if isinstance(which, int):
            which = slice(which, which + 1 or None)
        return Detections(self.boxes[which], self.scores[which], self.labels[which], self.names, self.size)

    def __repr__(self) -> str:
        height, width = self.size
        best = self.scores.argsort(descending=True, stable=True)[:5].tolist()
        found = [f"{self.names[int(self.labels[i])]} {float(self.scores[i]):.2f}" for i in best]
        rest = [f"and {len(self) - len(best)} more"] if len(self) > len(best) else []
        return f"Detections({len(self)} in {width}x{height}: {', '.join([*found, *rest]) or 'nothing found'})"

    def above(self, score: float) -> Detections:
        """Returns the detections whose score is at least `score`."""
        return self[self.scores >= score]

    def to_coco(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Returns entries of a COCO results file.

        Args:
            image_id: the image's id in the annotations.
            category_ids: the annotations' category id of each name.

        Returns:
            A dict for each detection: image_id, category_id, bbox [x, y, width, height] to a thousandth of a
                pixel,
            score.
        """
        if len(category_ids) != len(self.names):
            raise ValueError(f"{len(self.names)} names need as many category ids, got {len(category_ids)}")
        boxes = xyxy_to_xywh(self.boxes.double()).tolist()
        return [
            {
                "image_id": image_id,
                "category_id": int(category_ids[label]),
                "bbox": [round(value, 3) for value in box],
                "score": score,
            }
            for box, score, label in zip(boxes, self.scores.tolist(), self.labels.tolist(), strict=True)
        ]

    @classmethod
    def from_coco(
        cls,
        results: Sequence[dict[str, Any]],
        category_ids: Sequence[int],
        names: Sequence[str],
        size: tuple[int, int],
    ) -> Detections:
        """Reads one image's entries of a COCO results file.

        Args:
            results: entries of one image.
            category_ids: the category id of each name.
            names: the vocabulary's names.
            size: (height, width) of the image.

        Raises:
            ValueError: an entry's category is not among `category_ids`.
        """
        label_of = {category: label for label, category in enumerate(category_ids)}
        unknown = {entry["category_id"] for entry in results} - set(label_of)
        if unknown:
            raise ValueError(f"category ids {sorted(unknown)} have no name here; known: {sorted(label_of)}")
        boxes = torch.tensor([entry["bbox"] for entry in results], dtype=torch.float64).reshape(-1, 4)
        return cls(
            xywh_to_xyxy(boxes).float(),
            torch.tensor([entry["score"] for entry in results], dtype=torch.float32),
            torch.tensor([label_of[entry["category_id"]] for entry in results], dtype=torch.int64),
            tuple(names),
            size,
        )


def _span(values: Tensor) -> str:
    return f"{values.min().item():g}…{values.max().item():g}"
