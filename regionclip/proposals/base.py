"""The protocol of proposers, which plugins declare in the group `regionclip.proposers`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.jobs import plugins
from clip_base.jobs.config import Plugin, build_plugin, option
from clip_base.runtime.errors import InputError
from regionclip.structures.regions import ImageInfo, Regions

GROUP = "regionclip.proposers"


@dataclass(kw_only=True)
class BoxLimits:
    """Which boxes of an image are kept."""

    limit: int = option(300, "maximum number of boxes per image, those with the highest scores")
    min_score: float = option(0.0, "boxes with lower scores are left out, 0…1")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.limit < 1:
            raise InputError(f"limit must be at least 1 box per image, got {self.limit}")
        if not 0 <= self.min_score <= 1:
            raise InputError(f"min_score must be in 0…1, got {self.min_score}")


@dataclass(kw_only=True)
class SelectionConfig(BoxLimits):
    """Which proposals of a network are kept."""

    nms: float = option(0.7, "IoU above which the lower scored of two boxes is dropped")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        if not 0 < self.nms <= 1:
            raise InputError(f"nms must be above 0 and at most 1, got {self.nms}")


class Proposer(Protocol):
    """Proposes boxes where things may be, whatever they are.

    Its constructor takes `config`, a dataclass with its options, and may take `device`.
    """

    def __call__(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> Regions:
        """Returns boxes for every image of the batch.

        The i-th image fills `images.sizes[i]` of its frame and is the whole of `keys[i]`, resized and not
        cropped, so `frame_scale` brings an original box into the frame.

        Args:
            images: B images, normalized as CLIP's towers want them.
            keys: B keys, in the batch's order.

        Returns:
            boxes in the batch's frame, inside each image's unpadded size, sorted by image, then by falling
            score; `scores` in [0, 1]. An image may have none.
        """
        ...


def frame_scale(images: ImageBatch, keys: Sequence[ImageInfo]) -> Tensor:
    """Returns [B, 4] float32 factors (x, y, x, y) that turn original pixels into pixels of the batch's frame.

    Height and width have factors of their own, because a resized side is rounded to whole pixels.
    """
    if len(keys) != len(images):
        raise ValueError(f"a batch of {len(images)} images needs as many keys, got {len(keys)}")
    original = torch.tensor([(key.height, key.width) for key in keys], dtype=torch.float32).reshape(-1, 2)
    factors = images.sizes.float().cpu() / original  # [B, 2] (y, x)
    return factors[:, [1, 0, 1, 0]]


def collect(boxes: Sequence[Tensor], scores: Sequence[Tensor], device: torch.device) -> Regions:
    """Joins each image's [n, 4] boxes and [n] scores, already sorted, into one `Regions` on `device`."""
    counts = torch.tensor([len(rows) for rows in boxes], dtype=torch.int64)
    image_index = torch.repeat_interleave(torch.arange(len(boxes)), counts)
    return Regions(
        boxes=torch.cat([torch.zeros(0, 4, device=device), *(rows.to(device) for rows in boxes)]),
        image_index=image_index.to(device),
        scores=torch.cat([torch.zeros(0, device=device), *(rows.to(device) for rows in scores)]),
    )


def build_proposer(spec: Plugin, device: torch.device) -> Proposer:
    """Builds the proposer that a job's options name; `device` goes to those whose constructor takes one.

    Args:
        spec: the proposer's name and its own options.
        device: where a network is to run.

    Raises:
        InputError: no such proposer, or options that it does not have.
    """
    takes = inspect.signature(plugins.load(GROUP, str(spec.get("name", "")))).parameters
    context = {"device": device} if "device" in takes else {}
    proposer: Proposer = build_plugin(GROUP, spec, **context)
    return proposer
