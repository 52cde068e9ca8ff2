"""From objectness and class probabilities to one image's detections: fusion, thresholds, suppression."""

# N regions, C names, K detections
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from regionclip.concepts.negatives import CHOICES as NEGATIVES
from regionclip.structures.boxes import nms, soft_nms, valid_boxes
from regionclip.structures.regions import Regions

FUSIONS = ("geometric", "legacy_logit")
# Objectness this near to 0 or 1 counts as if it were so far away: its logit shall stay finite.
LOGIT_MARGIN = 1e-6
# How many pairs suppression looks at first, for each detection that is wanted.
FIRST_LOOK = 10


@dataclass
class DetectorConfig:
    """How regions become detections. The thresholds and the suppression are the published ones for COCO."""

    max_proposals: int = option(
        100,
        "maximum number of regions per image from the detector's proposal network",
        renamed_from="proposals",
    )
    max_embedded: int = option(
        0,
        "region_head=per_region: regions per image that it embeds, the best by objectness and a first score "
        "for which layer4 runs once on the whole image; 0: all",
    )
    proposal_nms: float = option(0.7, "IoU above which the lower scored of two proposals is dropped")
    temperature: float = option(0.0, "divisor of the cosines; 0: the tower's own, 1 / exp(logit scale)")
    allow_background: bool = option(
        False,
        "zero-shot: add a background class, as trained detectors have",
        renamed_from="background",
    )
    negatives: str = option(
        "auto",
        "zero-shot: generic names (background, materials, common things) that share the probabilities and "
        "are not reported; auto: where words of your own are looked for (detect, serve, Python), not in "
        "evaluation; generic: always; none: never, as published",
        choices=NEGATIVES,
    )
    fusion: str = option(
        "geometric",
        "geometric: objectness^alpha · p^(1-alpha); legacy_logit: sqrt(logit of objectness · p), which drops "
        "regions of negative logit, as RegionCLIP's released code does",
        choices=FUSIONS,
    )
    alpha_base: float = option(0.5, "exponent of objectness in the score of base names, in [0, 1]")
    alpha_novel: float = option(0.5, "exponent of objectness in the score of novel names, in [0, 1]")
    min_score: float = option(0.001, "detections with lower scores are dropped")
    nms_type: str = option(
        "soft",
        "nms drops overlapping boxes, soft lowers their scores",
        choices=("soft", "nms"),
        renamed_from="suppression",
    )
    nms: float = option(
        0.5, "nms_type=nms: IoU above which the lower scored of two boxes of a name is dropped"
    )
    soft_nms_sigma: float = option(0.5, "nms_type=soft: width of the Gaussian", renamed_from="sigma")
    soft_nms_min_score: float = option(
        0.001, "nms_type=soft: boxes whose score falls below this are dropped", renamed_from="prune"
    )
    max_detections: int = option(100, "maximum number of detections per image", renamed_from="detections")

    def __post_init__(self) -> None:
        for name in ("alpha_base", "alpha_novel"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in [0, 1], found {getattr(self, name)}")
        for name in ("max_proposals", "max_detections"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1 per image, found {getattr(self, name)}")
        if self.max_embedded < 0:
            raise InputError(f"max_embedded must be at least 0, found {self.max_embedded}")
        if self.temperature < 0 or self.soft_nms_sigma <= 0 or self.soft_nms_min_score < 0:
            raise InputError(
                f"temperature={self.temperature:g} and soft_nms_min_score={self.soft_nms_min_score:g} must "
                f"be at least 0, soft_nms_sigma={self.soft_nms_sigma:g} above 0"
            )


def fuse(objectness: Tensor, probabilities: Tensor, alpha: Tensor) -> Tensor:
    """Returns [N, C] scores objectness^α · p^(1−α), in [0, 1].

    Args:
        objectness: [N] in [0, 1].
        probabilities: [N, C] in [0, 1].
        alpha: [C] in [0, 1].
    """
    return objectness[:, None] ** alpha * probabilities ** (1 - alpha)


def fuse_logits(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Returns [N, C] scores sqrt(logit · p) as RegionCLIP's released code computes them.

    They may exceed 1. A region of negative logit has no square root: its row is NaN, and `postprocess` leaves
    it out as the released code does.

    Args:
        logits: [N] objectness before the sigmoid.
        probabilities: [N, C] in [0, 1].
    """
    return (logits[:, None] * probabilities).sqrt()


def score(regions: Regions, probabilities: Tensor, alpha: Tensor, fusion: str) -> Tensor:
    """Returns [N, C] scores of regions; those that carry no objectness count as certain objects.

    Args:
        regions: N regions, with objectness in `scores` and, where a network proposed them, in `logits`.
        probabilities: [N, C] in [0, 1].
        alpha: [C] exponents of objectness, for fusion="geometric".
        fusion: one of `FUSIONS`; a region without objectness has logit 1 for "legacy_logit".
    """
    objectness = regions.scores
    if fusion == "geometric":
        return fuse(
            probabilities.new_ones(len(regions)) if objectness is None else objectness, probabilities, alpha
        )
    if regions.logits is not None:
        return fuse_logits(regions.logits, probabilities)
    if objectness is None:
        return fuse_logits(probabilities.new_ones(len(regions)), probabilities)
    return fuse_logits(torch.logit(objectness, LOGIT_MARGIN), probabilities)


def best_of_each_image(regions: Regions, scores: Tensor, limit: int) -> Tensor:
    """Returns which regions [M] int64, ascending, score best: at most `limit` of each image.

    Args:
        regions: N regions.
        scores: [N, C]; a region's score is its best name's, and a row that is not finite comes last.
        limit: most regions of an image.
    """
    best = scores.amax(1).nan_to_num(
        -1.0, posinf=-1.0, neginf=-1.0
    )  # a NaN anywhere is the largest of its row
    order = best.argsort(descending=True, stable=True)
    order = order[regions.image_index[order].argsort(stable=True)]  # by image, then by score
    index = regions.image_index[order]
    within = torch.arange(len(index), device=index.device) - torch.searchsorted(index, index)
    return order[within < limit].sort().values


def to_unit_interval(scores: Tensor, fusion: str) -> Tensor:
    """Returns scores in [0, 1] in the same order: of "legacy_logit", which may exceed 1, s / (1 + s)."""
    return scores / (1 + scores) if fusion == "legacy_logit" else scores


def best_names(scores: Tensor) -> Tensor:
    """Returns [N, C] scores in which a region keeps the first of its best names; the others are -1.

    Args:
        scores: [N, C], C above 0; a row with a NaN stays without one.
    """
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argmax(1, keepdim=True), True)
    return scores.where(best, -1.0)


def postprocess(boxes: Tensor, scores: Tensor, config: DetectorConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Picks one image's detections: threshold, suppression within each name, the best of all names.

    The result is that of suppression over every pair above the threshold, as published, but seldom needs to
    look at them all: a pair is lowered or dropped by better ones alone, so that what the best pairs give is
    the beginning of the whole result, down to the score of the best pair that was not looked at.

    Args:
        boxes: [N, 4]; those without area, or not finite, are left out.
        scores: [N, C]; a row that is not finite is left out.
        config: thresholds and suppression.

    Returns:
        boxes [K, 4], scores [K] and labels [K], best first, on the CPU.
    """
    usable = valid_boxes(boxes) & scores.amax(1).isfinite()  # a NaN anywhere is the largest of its row
    flat = scores.float().masked_fill(~usable[:, None], -1.0).flatten()
    look = FIRST_LOOK * config.max_detections
    while True:
        values, pairs = flat.topk(min(look, len(flat)))
        pairs = pairs[values >= config.min_score]
        # On the CPU from here on: suppression is many small steps, each of which a GPU would start slowly.
        values, labels = flat[pairs].cpu(), (pairs % scores.shape[1]).cpu()
        candidates = boxes[pairs // scores.shape[1]].float().cpu()
        kept, final = _suppress(candidates, values, labels, config)
        whole = look > len(pairs) or look >= len(flat)
        if whole or (len(kept) == config.max_detections and final[-1] >= values[-1]):
            return candidates[kept], final, labels[kept]
        look *= 4


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, config: DetectorConfig) -> tuple[Tensor, Tensor]:
    """Returns the indices and final scores of the best pairs that are left."""
    if config.nms_type == "soft":
        return soft_nms(
            boxes, scores, labels, config.soft_nms_sigma, config.soft_nms_min_score, config.max_detections
        )
    kept = nms(boxes, scores, labels, config.nms)[: config.max_detections]
    return kept, scores[kept]
