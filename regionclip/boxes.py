"""Box arithmetic on flat tensors: frames, overlap, regression deltas, suppression.

Boxes are (x1, y1, x2, y2) in pixels, continuous (a box that covers an image of width W ends at W, not at W -
1).
"""

# N, M boxes; G classes of similar size; L boxes in the largest of them
from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.ops import nms as single_nms

# A predicted box grows at most 1000/16 times, as in Detectron's Faster R-CNN: keeps exp() finite early in
# training.
MAX_LOG_SCALE = math.log(1000.0 / 16)
# How often soft-NMS forgets what is decided, and the first steps at which it does: those decide most.
COMPACT_EVERY = 32
EARLY = (1, 2, 4, 8, 16)
# Cells of a table of boxes, a class a row, that need not be parted to save work.
SMALL_TABLE = 2**16
# Boxes up to which comparing each with each is quicker than going through the classes one by one.
FEW_BOXES = 5_000


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turns [..., 4] (left, top, width, height), COCO's form, into (x1, y1, x2, y2)."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Turns [..., 4] (x1, y1, x2, y2) into (left, top, width, height), COCO's form."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """Returns [N] square pixels; 0 for boxes whose corners are swapped."""
    return (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Returns [N, M] square pixels that boxes a [N, 4] and b [M, 4] share."""
    top_left = torch.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (bottom_right - top_left).clamp(min=0).prod(-1)  # [N, M]


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Returns [N, M] intersection over union in [0, 1] of a [N, 4] and b [M, 4]; 0 where neither has area."""
    shared = intersection(a, b)
    union = area(a)[:, None] + area(b)[None] - shared
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0)


def clip_boxes(boxes: Tensor, size: tuple[int, int] | Tensor) -> Tensor:
    """Moves corners that lie outside the image onto its edge.

    Args:
        boxes: [N, 4].
        size: (height, width) of the image, or [N, 2] of each box's image.
    """
    sizes = torch.as_tensor(size, device=boxes.device).to(boxes.dtype).expand(len(boxes), 2)
    limits = sizes.flip(-1).repeat(1, 2)  # [N, 4]: width, height, width, height
    return torch.minimum(boxes.clamp(min=0), limits)


def valid_boxes(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Returns [N] bool: finite, and wider and higher than `min_size` pixels."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes.isfinite().all(-1) & (sides > min_size).all(-1)


def encode_deltas(
    anchors: Tensor, targets: Tensor, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """Returns what must be regressed to move each anchor onto its target.

    The parametrisation of Faster R-CNN (arXiv 1506.01497, section 3.1.2): the centre's shift in units of the
    anchor's sides, and the logarithm of the sides' ratio.

    Args:
        anchors: [N, 4], each with an area.
        targets: [N, 4], each with an area.
        weights: factors for (dx, dy, dw, dh); detectors commonly use (10, 10, 5, 5) in their second stage.

    Returns:
        [N, 4] (dx, dy, dw, dh).
    """
    sides, target_sides = anchors[:, 2:] - anchors[:, :2], targets[:, 2:] - targets[:, :2]
    centres, target_centres = anchors[:, :2] + sides / 2, targets[:, :2] + target_sides / 2
    deltas = torch.cat([(target_centres - centres) / sides, (target_sides / sides).log()], dim=1)
    return deltas * deltas.new_tensor(weights)


def decode_deltas(
    anchors: Tensor, deltas: Tensor, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """Returns [N, 4]: anchors [N, 4] moved by deltas [N, 4], the inverse of `encode_deltas`.

    Sides grow at most 1000/16 times, whatever the deltas say.
    """
    deltas = deltas.to(anchors.dtype) / anchors.new_tensor(weights)
    sides = anchors[:, 2:] - anchors[:, :2]
    centres = anchors[:, :2] + sides / 2 + deltas[:, :2] * sides
    half = sides * deltas[:, 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centres - half, centres + half], dim=1)


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Returns the indices that survive, best first: no kept box overlaps a better one of its label by more.

    Args:
        boxes: [N, 4].
        scores: [N].
        labels: [N]; boxes of different labels never suppress each other.
        threshold: the largest IoU that two kept boxes of a label may have.
    """
    kept: Tensor
    if len(boxes) > FEW_BOXES or not len(boxes):
        kept = batched_nms(boxes.float(), scores.float(), labels, threshold)
        return kept
    # Classes are moved apart. In float64, or boxes of the last of many classes would lose their fractions.
    low, high = boxes.aminmax()
    apart = boxes.double() + (labels * (high - low + 1).double())[:, None]
    kept = single_nms(apart, scores.double(), threshold)
    return kept


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    sigma: float = 0.5,
    threshold: float = 0.001,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gaussian soft-NMS (arXiv 1704.04503, section 3), over all labels at once.

    Within a label the best box is taken, and every other's score is multiplied by exp(-IoU² / sigma); then
    the next best is taken, until none is left. All labels take their best in the same step, so that the
    number of steps is that of the largest label and not that of all boxes. With a limit it is fewer: scores
    only fall, so a box that scores less than `limit` boxes taken so far will not be among the best.

    Args:
        boxes: [N, 4].
        scores: [N], not below 0.
        labels: [N].
        sigma: above 0; the smaller, the harder overlapping boxes are punished.
        threshold: at least 0; a box whose score falls below it is dropped.
        limit: how many of the result's first boxes are wanted; None: all.

    Returns:
        Indices into `boxes` [K] and the decayed scores [K], best first.
    """
    if sigma <= 0 or threshold < 0:
        raise ValueError(
            f"soft-NMS needs sigma above 0 and threshold at least 0, got {sigma} and {threshold}"
        )
    taken = _Taken(labels.new_zeros(0), scores.new_zeros(0, dtype=torch.float32), threshold, limit)
    for index in _padded_classes(labels):  # [G, L] indices into boxes, -1 where a class has fewer
        _soft_nms_rows(boxes.float()[index], scores.float()[index], index, sigma, taken)
    return taken.best()


class _Taken:
    """The boxes that soft-NMS has taken so far, and the score below which none can follow."""

    def __init__(self, indices: Tensor, scores: Tensor, threshold: float, limit: int | None) -> None:
        self.indices, self.scores, self.limit = [indices], [scores], limit
        self.floor = threshold

    def add(self, indices: Tensor, scores: Tensor) -> None:
        """Notes one box a class; a score below the floor says that the class has none left."""
        self.indices.append(indices)
        self.scores.append(scores)

    def best(self) -> tuple[Tensor, Tensor]:
        """Returns the indices and scores taken, best first, and raises the floor to the last of them."""
        indices, scores = torch.cat(self.indices), torch.cat(self.scores)
        indices, scores = indices[scores >= self.floor], scores[scores >= self.floor]
        order = scores.argsort(descending=True, stable=True)[: self.limit]
        self.indices, self.scores = [indices[order]], [scores[order]]
        if len(order) == self.limit:
            self.floor = max(self.floor, float(self.scores[0][-1]))
        return self.indices[0], self.scores[0]


def _padded_classes(labels: Tensor) -> Iterator[Tensor]:
    """Yields [G, L] tables of box indices, a class a row, padded with -1; classes of like size together."""
    if not len(labels):
        return
    order = labels.argsort(stable=True)
    counts = torch.unique_consecutive(labels[order], return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    by_size = counts.argsort(descending=True, stable=True)
    sizes = counts[by_size].tolist()
    first = 0
    while first < len(sizes):
        last = len(sizes)
        if sizes[first] * (last - first) > SMALL_TABLE:
            # One huge class must not make every row of the table as long as itself.
            last = next((i for i in range(first, last) if sizes[i] * 8 < sizes[first]), last)
        rows = by_size[first:last]
        column = torch.arange(sizes[first], device=labels.device)  # [L]
        inside = column[None] < counts[rows, None]  # [G, L]
        position = (starts[rows, None] + column[None]).clamp(max=len(labels) - 1)
        yield torch.where(inside, order[position], -1)
        first = last


def _soft_nms_rows(boxes: Tensor, scores: Tensor, index: Tensor, sigma: float, taken: _Taken) -> None:
    """Soft-NMS within each row of boxes [G, L, 4] and scores [G, L]; `index` [G, L] is -1 where no box is."""
    scores = scores.masked_fill(index < 0, -1.0)  # -1: decided, or not there
    for step in range(index.shape[1]):
        if step % COMPACT_EVERY == 0 or step in EARLY:
            taken.best()
            scores = scores.masked_fill(scores < taken.floor, -1.0)
            boxes, scores, index = _compact(boxes, scores, index)
            if not index.numel():
                break
            x1, y1, x2, y2 = (side.contiguous() for side in boxes.unbind(-1))  # [G, L] each
            areas = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
        best, column = scores.max(1, keepdim=True)  # [G, 1]
        taken.add(index.gather(1, column)[:, 0], best[:, 0])
        width = torch.minimum(x2, x2.gather(1, column)) - torch.maximum(x1, x1.gather(1, column))
        height = torch.minimum(y2, y2.gather(1, column)) - torch.maximum(y1, y1.gather(1, column))
        shared = width.clamp_(min=0).mul_(height.clamp_(min=0))
        union = (areas + areas.gather(1, column)).sub_(shared).clamp_(min=torch.finfo(shared.dtype).tiny)
        decay = shared.div_(union).square_().div_(-sigma).exp_()  # [G, L]
        scores = scores.mul_(decay).scatter_(1, column, -1.0)
        scores.masked_fill_(scores < taken.floor, -1.0)


def _compact(boxes: Tensor, scores: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drops the rows and columns of which nothing is left to decide; the order within a row stays."""
    open_ = scores >= 0  # [G, L]
    counts = open_.sum(1)
    rows = counts > 0
    length = int(counts.max()) if len(counts) else 0
    columns = (~open_[rows]).int().argsort(dim=1, stable=True)[:, :length]  # [G', L']
    return (
        boxes[rows].gather(1, columns[..., None].expand(-1, -1, 4)),
        scores[rows].gather(1, columns),
        index[rows].gather(1, columns),
    )
