"""Boxes that another program proposed, read from a file in COCO's results form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_base.batch import ImageBatch
from clip_base.config import REQUIRED, option
from clip_base.errors import InputError
from clip_base.files import read_json
from regionclip.proposals.base import ImageKey, collect, frame_scale
from regionclip.structures import Regions


@dataclass
class PrecomputedConfig:
    """Options of the proposer `precomputed`."""

    file: str = option(
        REQUIRED, "JSON list of {image_id, bbox: [x, y, width, height] in original pixels, score in 0…1}"
    )
    limit: int = option(300, "most boxes an image, the best scored ones")
    min_score: float = option(0.0, "boxes scored lower are left out, 0…1")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.limit < 1:
            raise InputError(f"limit must be at least 1 box an image, got {self.limit}")
        if not 0 <= self.min_score <= 1:
            raise InputError(f"min_score must lie in 0…1, got {self.min_score}")


class PrecomputedProposer:
    """Looks each image's boxes up in a file and scales them to the batch's frame.

    An image that the file does not mention has no regions. Boxes are cut at the image's edges; what lies
    outside it altogether, or has no area, is left out.
    """

    def __init__(self, config: PrecomputedConfig) -> None:
        self.config = config
        self._boxes, self._scores = _read(config.file)

    def __call__(self, images: ImageBatch, keys: Sequence[ImageKey]) -> Regions:
        """See `Proposer`. The pixels are not looked at."""
        boxes, scores = [], []
        for key, scale in zip(keys, frame_scale(images, keys), strict=True):
            rows, values = self._of_image(key)
            boxes.append(rows * scale)
            scores.append(values)
        return collect(boxes, scores, images.pixels.device)

    def _of_image(self, key: ImageKey) -> tuple[Tensor, Tensor]:
        """Returns an image's [n, 4] boxes in original pixels and their [n] scores, best first."""
        if key.image_id not in self._boxes:
            return torch.zeros(0, 4), torch.zeros(0)
        limits = torch.tensor([key.width, key.height, key.width, key.height], dtype=torch.float32)
        boxes = torch.minimum(self._boxes[key.image_id], limits).clamp(min=0)
        scores = self._scores[key.image_id]
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & (scores >= self.config.min_score)
        return boxes[keep][: self.config.limit], scores[keep][: self.config.limit]


def _read(path: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Returns each image's boxes, (x1, y1, x2, y2), and scores, both by falling score."""
    entries = read_json(path, "proposals file")
    if not isinstance(entries, list):
        raise InputError(
            f"proposals file {path} holds a JSON {type(entries).__name__}; "
            "expected a list of boxes in COCO's results form"
        )
    rows: dict[int, list[tuple[float, ...]]] = {}
    for number, entry in enumerate(entries):
        image_id, row = _checked(entry, f"proposals file {path}, entry {number}")
        rows.setdefault(image_id, []).append(row)
    boxes, scores = {}, {}
    for image_id, values in rows.items():
        table = torch.tensor(values, dtype=torch.float64)  # [n, 5] x, y, width, height, score
        table = table[table[:, 4].argsort(descending=True, stable=True)]
        boxes[image_id] = torch.cat([table[:, :2], table[:, :2] + table[:, 2:4]], dim=1).float()
        scores[image_id] = table[:, 4].float()
    return boxes, scores


def _checked(entry: Any, where: str) -> tuple[int, tuple[float, ...]]:
    """Returns an entry's image id and (x, y, width, height, score); InputError when it is malformed."""
    try:
        image_id, box, score = int(entry["image_id"]), entry["bbox"], float(entry["score"])
        row = (*(float(value) for value in box), score)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: needs image_id, bbox and score ({type(error).__name__}: {error})"
        ) from None
    if len(row) != 5 or not all(math.isfinite(value) for value in row) or row[2] < 0 or row[3] < 0:
        raise InputError(f"{where}: bbox must be four finite numbers x, y, width, height, found {box}")
    if not 0 <= score <= 1:
        raise InputError(
            f"{where}: score is {score}, expected objectness in 0…1; apply a sigmoid if these are logits"
        )
    return image_id, row
