"""The true boxes of a dataset as proposals: what a detector would do if it missed nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from clip_base.batch import ImageBatch
from regionclip.datasets import Record
from regionclip.proposals.base import ImageKey, collect, frame_scale
from regionclip.structures import Regions


class TruthProposer:
    """Proposes each image's true boxes, all with objectness 1; crowds are left out.

    Args:
        records: the annotated images.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.boxes = {record.image_id: record.without_crowds().boxes for record in records}

    def __call__(self, images: ImageBatch, keys: Sequence[ImageKey]) -> Regions:
        """See `Proposer`. The pixels are not looked at."""
        scales = frame_scale(images, keys)
        boxes = [self.boxes[key.image_id] * scale for key, scale in zip(keys, scales, strict=True)]
        return collect(boxes, [torch.ones(len(rows)) for rows in boxes], images.pixels.device)
