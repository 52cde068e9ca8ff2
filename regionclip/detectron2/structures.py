"""Conversion between our flat structures and detectron2's Instances."""

# B images, N regions or boxes in all
from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from clip_base.data.batch import ImageBatch
from regionclip.proposals.base import collect
from regionclip.structures.detections import Detections
from regionclip.structures.regions import Regions


def to_instances(detections: Detections) -> Instances:
    """Returns one image's detections with the fields that detectron2's models give.

    `pred_boxes` in pixels of the original image, `scores`, and `pred_classes`, which count the detections'
    names.
    """
    return Instances(
        detections.size,
        pred_boxes=Boxes(detections.boxes),
        scores=detections.scores,
        pred_classes=detections.labels,
    )


def from_instances(instances: Instances, names: Sequence[str]) -> Detections:
    """Returns a model's output for one image as detections, on the CPU.

    Args:
        instances: with `pred_boxes`, `scores` in [0, 1] and `pred_classes`.
        names: what the classes are called, in their order.

    Raises:
        ValueError: a class has no name, or a score lies outside [0, 1].
    """
    found = instances.to("cpu")
    height, width = found.image_size
    return Detections(
        found.pred_boxes.tensor.float(),
        found.scores.float(),
        found.pred_classes.long(),
        tuple(names),
        (int(height), int(width)),
    )


def to_proposals(regions: Regions, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
    """Returns B lists of proposals with `proposal_boxes` and `objectness_logits`.

    Args:
        regions: with scores in [0, 1], or logits.
        sizes: (height, width) of each image in the batch's frame.
    """
    logits = regions.logits
    if logits is None:
        if regions.scores is None:
            raise ValueError("regions without scores have no objectness; give them scores in [0, 1]")
        logits = torch.logit(regions.scores)
    mine = [regions.image_index == slot for slot in range(len(sizes))]
    return [
        Instances(size, proposal_boxes=Boxes(regions.boxes[rows]), objectness_logits=logits[rows])
        for size, rows in zip(sizes, mine, strict=True)
    ]


def from_proposals(proposals: Sequence[Instances]) -> Regions:
    """Returns B images' proposals as regions; scores are the sigmoid of their logits."""
    boxes = [found.proposal_boxes.tensor.float() for found in proposals]
    logits = [found.objectness_logits.float() for found in proposals]
    device = boxes[0].device if boxes else torch.device("cpu")
    regions = collect(boxes, [values.sigmoid() for values in logits], device)
    return Regions(
        regions.boxes, regions.image_index, scores=regions.scores, logits=_joined(logits, regions.boxes)
    )


def from_truth(targets: Sequence[Instances]) -> Regions:
    """Returns B images' true boxes as regions, labels from `gt_classes`."""
    boxes = torch.cat([found.gt_boxes.tensor.float() for found in targets])
    counts = torch.tensor([len(found) for found in targets], device=boxes.device)
    index = torch.repeat_interleave(torch.arange(len(targets), device=boxes.device), counts)
    return Regions(boxes, index, labels=torch.cat([found.gt_classes for found in targets]))


def from_images(images: ImageList) -> ImageBatch:
    """Returns a batch that detectron2 padded as ours; its pixels must be normalized for CLIP."""
    sizes = torch.tensor([(int(h), int(w)) for h, w in images.image_sizes], device=images.tensor.device)
    return ImageBatch(images.tensor, sizes.reshape(-1, 2))


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like.new_zeros(0), *parts])
