"""Box arithmetic on flat tensors: frames, overlap, regression deltas, suppression.

Boxes are (x1, y1, x2, y2) in pixels, continuous (a box that covers an image of width W ends at W, not at W -
1).
"""

# N, M boxes; G classes of similar size; L boxes in the largest of them
from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.ops import nms as single_nms

Floats = NDArray[np.float32]
Places = NDArray[np.int64]
# A predicted box grows at most 1000/16 times, as in Detectron's Faster R-CNN: keeps exp() finite early in
# training.
MAX_LOG_SCALE = math.log(1000.0 / 16)
# Steps after which soft-NMS forgets what is decided, at least, and their share of the largest class.
FORGET_EVERY, FORGET_SHARE = 32, 4
TINY = float(np.finfo(np.float32).tiny)
# Cells of a table of boxes, one class per row, that need not be parted to save work.
SMALL_TABLE = 2**16
# Boxes up to which comparing each with each is quicker than going through the classes one by one.
FEW_BOXES = 5_000


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turns [..., 4] (left, top, width, height), COCO's format, into (x1, y1, x2, y2)."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Turns [..., 4] (x1, y1, x2, y2) into (left, top, width, height), COCO's format."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """Returns [N] square pixels; 0 for boxes whose corners are swapped."""
    return (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)


def smallest_at(boxes: Tensor, x: float, y: float) -> int | None:
    """Returns which of [N, 4] boxes is the smallest that holds a point; None when none does."""
    holds = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
    return int(area(boxes).masked_fill(~holds, math.inf).argmin()) if bool(holds.any()) else None


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
    sizes = torch.as_tensor(size, device=boxes.device).to(boxes.dtype).expand(boxes.shape[0], 2)
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

    The parametrisation of Faster R-CNN (arXiv 1506.01497, section 3.1.2): the center's shift in units of the
    anchor's sides, and the logarithm of the sides' ratio.

    Args:
        anchors: [N, 4], each with an area.
        targets: [N, 4], each with an area.
        weights: factors for (dx, dy, dw, dh); detectors commonly use (10, 10, 5, 5) in their second stage.

    Returns:
        [N, 4] (dx, dy, dw, dh).
    """
    sides, target_sides = anchors[:, 2:] - anchors[:, :2], targets[:, 2:] - targets[:, :2]
    centers, target_centers = anchors[:, :2] + sides / 2, targets[:, :2] + target_sides / 2
    deltas = torch.cat([(target_centers - centers) / sides, (target_sides / sides).log()], dim=1)
    return deltas * deltas.new_tensor(weights)


def decode_deltas(
    anchors: Tensor, deltas: Tensor, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """Returns [N, 4]: anchors [N, 4] moved by deltas [N, 4], the inverse of `encode_deltas`.

    Sides grow at most 1000/16 times, whatever the deltas say.
    """
    deltas = deltas.to(anchors.dtype) / anchors.new_tensor(weights)
    sides = anchors[:, 2:] - anchors[:, :2]
    centers = anchors[:, :2] + sides / 2 + deltas[:, :2] * sides
    half = sides * deltas[:, 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centers - half, centers + half], dim=1)


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


def best_survivors(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, limit: int) -> Tensor:
    """Returns the first `limit` of what torchvision's `batched_nms` returns, for less when it is few.

    A box is dropped only for better ones. So the survivors among the best boxes are known from these alone,
    and more are looked at only as long as too few survive; the time grows with the square of their number.

    Args:
        boxes: [N, 4].
        scores: [N].
        labels: [N].
        threshold: the largest IoU that two kept boxes of a label may have.
        limit: how many to return at most.
    """
    order = scores.argsort(descending=True, stable=True)
    seen = min(4 * limit, len(order))
    while True:
        some = order[:seen]
        kept: Tensor = batched_nms(boxes[some], scores[some], labels[some], threshold)
        if len(kept) >= limit or seen == len(order):
            return some[kept[:limit]]
        seen = min(2 * seen, len(order))


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
    the next best is taken, until none is left; of equals the first. All labels take their best in the same
    step, so that the number of steps is that of the largest label and not that of all boxes. With a limit it
    is fewer: scores only fall, so a box that scores less than `limit` boxes taken so far will not be among
    the best. Works on the CPU, wherever the boxes are: it is many small steps, each of which a GPU would
    start slowly. The memory is that of the boxes.

    Args:
        boxes: [N, 4].
        scores: [N], not below 0.
        labels: [N].
        sigma: above 0; the smaller, the harder overlapping boxes are punished.
        threshold: at least 0; a box whose score falls below it is dropped.
        limit: how many of the result's first boxes are wanted, at least 1; None: all.

    Returns:
        Indices into `boxes` [K] and the decayed scores [K], best first; of equals the first label, then the
        first box.
    """
    if sigma <= 0 or threshold < 0 or (limit is not None and limit < 1):
        raise ValueError(
            "soft-NMS needs sigma above 0, threshold at least 0 and limit at least 1, "
            f"got {sigma}, {threshold} and {limit}"
        )
    names = labels.cpu().numpy()
    names = names - names.min(initial=0)
    # NumPy sorts small integers by counting.
    order = np.argsort(names.astype(np.min_scalar_type(names.max(initial=0))), kind="stable")
    corners = boxes.detach().float().cpu()[torch.from_numpy(order)]
    # The left and upper sides negated: one minimum then gives what two boxes share.
    facts = torch.cat([-corners.T[:2], corners.T[2:], area(corners).clamp(min=TINY)[None]]).numpy()  # [5, N]
    values = scores.detach().float().cpu().numpy()[order]
    taken = _Taken(len(order), threshold, limit)
    for index in _padded_classes(np.unique(names[order], return_counts=True)[1]):
        _soft_nms_rows(facts, values, index, sigma, taken)
    kept = taken.places()
    found = torch.from_numpy(order[kept]), torch.from_numpy(taken.scores[kept])
    return found[0].to(boxes.device), found[1].to(boxes.device)


class _Taken:
    """The boxes that soft-NMS has taken so far, and the score below which none can follow."""

    def __init__(self, count: int, threshold: float, limit: int | None) -> None:
        self.scores = np.full(count, -1, np.float32)  # with which each was taken; -1: it was not
        self.threshold, self.limit = threshold, limit
        self.floor = max(threshold, TINY)  # a score of 0 says that a box is decided
        self._best = np.zeros(0, np.float32)

    def add(self, places: Places, scores: Floats) -> None:
        """Notes boxes; a score below the floor says that a class had none left."""
        above = scores >= self.floor
        self.scores[places[above]] = scores[above]
        if self.limit is not None:
            self._best = np.concatenate([self._best, scores[above]])
            if len(self._best) >= self.limit:
                self._best = np.partition(self._best, -self.limit)[-self.limit :]
                self.floor = max(self.floor, float(self._best[0]))

    def places(self) -> Places:
        """Returns [K], the best of them first, when all boxes were looked at."""
        if not self.threshold:
            self.scores[self.scores < 0] = 0  # nothing but their scores dropped them
        kept = np.flatnonzero(self.scores >= (self.floor if self.threshold else 0))
        # Sorted with their places as one number: many times as fast as a stable sort of the scores. Floats
        # that are not negative have the order of their bits.
        keys = (self.scores[kept].view(np.int32).astype(np.int64) << 32) - kept
        keys.sort()
        return (-keys[::-1] & 0xFFFFFFFF)[: self.limit]


def _padded_classes(counts: Places) -> Iterator[Places]:
    """Yields [G, L] tables of places, one class per row, padded with -1; classes of like size together.

    Args:
        counts: boxes in each class; their places follow each other.
    """
    starts = counts.cumsum() - counts
    classes = (-counts).argsort(kind="stable")
    while len(classes):
        sizes, last = counts[classes], len(classes)
        if sizes[0] * last > SMALL_TABLE:
            # One huge class must not make every row of the table as long as itself.
            last = int((sizes * 8 >= sizes[0]).sum())
        column = np.arange(sizes[0])
        yield np.where(column < sizes[:last, None], starts[classes[:last], None] + column, -1)
        classes = classes[last:]


def _padded(values: Places, counts: Places) -> Places:
    """Returns [G, L]: the first of `counts` [G] values in row 0, and so on; -1 where a row has fewer."""
    table = np.full((len(counts), counts.max()), -1)
    table[np.arange(table.shape[1]) < counts[:, None]] = values
    return table


def _soft_nms_rows(facts: Floats, scores: Floats, index: Places, sigma: float, taken: _Taken) -> None:
    """Soft-NMS within each row of a table.

    Args:
        facts: [5, N] of boxes: -x1, -y1, x2, y2 and area.
        scores: [N].
        index: [G, L] boxes; -1 where none is.
        sigma: see `soft_nms`.
        taken: takes what is found.
    """
    steps = 1
    left = np.where(index < 0, 0, scores[index])  # [G, L], 0: decided, or not there
    while True:
        open_ = left >= taken.floor
        counts = open_.sum(1)
        if not counts.any():
            return
        # What is decided is forgotten; the order within a row stays.
        place = _padded(np.flatnonzero(open_), counts[counts > 0])
        left = np.where(place < 0, 0, left.take(place, mode="clip"))
        index = index.take(place, mode="clip")
        most = max(FORGET_EVERY, place.shape[1] // FORGET_SHARE)
        # With a limit the first steps decide most.
        count, steps = (most if taken.limit is None else min(steps, most)), 2 * steps
        found, values = _take(facts.take(index, 1, mode="clip"), left, sigma, count)
        taken.add(index.ravel()[found], values)


def _take(facts: Floats, scores: Floats, sigma: float, steps: int) -> tuple[Places, Floats]:
    """Takes the best of each row of boxes [5, G, L] `steps` times; scores [G, L] decay in place.

    Returns:
        Flat places in the table and the scores taken, [G * steps] each.
    """
    flat_facts, flat = facts.reshape(5, -1), scores.reshape(-1)
    areas, nearest = facts[4], np.empty_like(facts[:4])  # [G, L], [4, G, L]
    none, shared, union = np.zeros_like(facts[:2]), np.empty_like(facts[:2]), np.empty_like(scores)
    inner = shared[0]
    sides, meeting = torch.from_numpy(facts[:4]), torch.from_numpy(nearest)
    rows = np.arange(len(scores)) * scores.shape[1]
    places = np.empty((steps, len(scores)), np.int64)
    values = np.empty((steps, len(scores)), np.float32)
    for place, value in zip(places, values, strict=True):
        scores.argmax(1, out=place)
        place += rows
        flat.take(place, out=value, mode="clip")
        flat[place] = 0
        best = flat_facts.take(place, 1)[:, :, None]  # [5, G, 1]
        # Torch spreads a column over rows twice as fast as NumPy, which does the rest with less ado.
        torch.minimum(sides, torch.from_numpy(best[:4]), out=meeting)
        np.add(nearest[:2], nearest[2:], out=shared)
        np.maximum(shared, none, out=shared)
        np.multiply(inner, shared[1], out=inner)
        np.add(areas, best[4], out=union)
        np.subtract(union, inner, out=union)
        np.divide(inner, union, out=inner)  # [G, L] IoU
        np.multiply(inner, inner, out=inner)
        np.multiply(inner, -1 / sigma, out=inner)
        np.exp(inner, out=inner)
        np.multiply(scores, inner, out=scores)
    return places.ravel(), values.ravel()
