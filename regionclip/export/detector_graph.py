"""A detector as a single graph, from an image's pixels to boxes, scores and labels.

What `Detector.detect_batch` does for one image, in a form that can be traced: as many proposals for every
image (some of them empty), and suppression in a fixed number of steps. It calls the detector's own parts.
"""

# P proposals, C names, D embedding size, K detections, S steps of suppression
from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import normalize
from clip_base.runtime.errors import InputError
from regionclip.models.detector import DELTA_WEIGHTS, Detector
from regionclip.models.postprocess import best_names, score, to_unit_interval
from regionclip.models.student import geometric_mean
from regionclip.structures.boxes import clip_boxes, decode_deltas, iou, valid_boxes
from regionclip.structures.regions import FeatureMaps, Regions


class DetectorGraph(nn.Module):
    """What is exported of a detector.

    Args:
        detector: with a proposal network and a vocabulary, in evaluation mode; it is copied, in float32 and
            without its text tower.
        suppress: whether overlapping boxes of a name suppress each other, and the best are picked.
    """

    embeddings: Tensor
    negatives: Tensor
    background: Tensor | None
    alpha: Tensor
    exponents: Tensor | None
    student_negatives: Tensor

    def __init__(self, detector: Detector, suppress: bool = True) -> None:
        super().__init__()
        if detector.network is None:
            raise InputError("a CLIP has no proposal network; give one: network=FILE")
        if detector.config.max_embedded:
            raise InputError(
                "a graph embeds every proposal: set detector.max_embedded=0, or train with region_head=shared"
            )
        if detector.vocabulary is None:
            raise ValueError("no vocabulary is set; call set_vocabulary first")
        text = getattr(detector.clip, "text", None)
        detector = copy.deepcopy(detector, {id(text): nn.Identity()} if text is not None else {})
        detector.float().requires_grad_(False)
        assert detector.network is not None
        # The temperature as a number: a graph cannot ask a tensor for one.
        detector.config = dataclasses.replace(detector.config, temperature=1 / detector.scale)
        self.detector, self.network, self.suppress = detector, detector.network, suppress
        self.multiple = detector.resize.multiple
        self.register_buffer("embeddings", detector.classifier.clone())
        self.register_buffer("negatives", detector.negatives.clone())
        self.register_buffer("alpha", detector.alpha.clone())
        background = None
        if detector.background is not None:
            background = detector.background.detach().clone()
        elif detector.config.allow_background:
            background = torch.zeros(detector.clip.config.embed_dim)
        self.register_buffer("background", background)
        student = detector.student if detector.asks_student else None
        self.register_buffer("exponents", None if student is None else student.exponents(detector.novel))
        self.register_buffer("student_negatives", detector.student_negatives.clone())

    def forward(
        self,
        image: Tensor,
        embeddings: Tensor | None = None,
        background: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Finds things in one image.

        Args:
            image: [H, W, 3] uint8 RGB, at the size at which it is to be seen.
            embeddings: [C, D], unit length; None: the detector's vocabulary.
            background: [D], what stands for none of the names; None: the detector's.
            alpha: [C], each name's exponent of objectness; None: the detector's.

        Returns:
            boxes [K, 4] (x1, y1, x2, y2) in pixels of the image, scores [K] in [0, 1] and labels [K] int64,
                best first; without suppression boxes [P, 4] and scores [P, C], which are 0 where a box is
                none or a score is below the detector's least.
        """
        rows = self.embeddings if embeddings is None else embeddings
        alpha = self.alpha if alpha is None else alpha
        count = rows.shape[0]
        if self.negatives.shape[0]:
            rows = torch.cat([rows, self.negatives])
        none = self.background if background is None else background
        if none is not None:
            rows = torch.cat([rows, none[None]])
        pixels = normalize(image.permute(2, 0, 1)[None])
        seen = ImageBatch.whole(pixels)
        images = dataclasses.replace(seen, pixels=_padded(pixels, self.multiple))
        maps = self.detector.feature_maps(images)
        regions, there = self.propose(seen, maps)
        found, deltas = self.detector.roi_heads(maps, regions)
        boxes = regions.boxes if deltas is None else decode_deltas(regions.boxes, deltas, DELTA_WEIGHTS)
        boxes = clip_boxes(boxes, seen.sizes)
        # The negatives and the background, rows like names' here, take their share and go.
        probabilities = self.detector.logits(found, rows, False).softmax(1)[:, :count]  # [P, C]
        if self.detector.student is not None and self.exponents is not None:
            names = rows if none is None else rows[:-1]
            names = torch.cat([names, self.student_negatives])
            known = self.detector.student.probabilities(images, regions, names)[:, :count]
            probabilities = geometric_mean(probabilities, known, self.exponents)
        config = self.detector.config
        scores = score(regions, probabilities, alpha, config.fusion)
        usable = there & valid_boxes(boxes) & scores.isfinite().all(1)
        boxes = torch.where(usable[:, None], boxes, 0.0)
        scores = torch.where(usable[:, None] & (scores >= config.min_score), scores, -1.0)
        if not self.suppress:
            return boxes, to_unit_interval(scores.clamp(min=0), config.fusion)
        if self.detector.one_name:
            scores = best_names(scores)
        boxes, scores, labels = self.pick(boxes, scores)
        return boxes, to_unit_interval(scores, config.fusion), labels

    def propose(self, seen: ImageBatch, maps: FeatureMaps) -> tuple[Regions, Tensor]:
        """Returns P regions, best first, and which of them are there: [P] bool; the others fill up.

        Args:
            seen: the image.
            maps: the same, padded, with the CLIP trunk's maps of it for a network that shares them.
        """
        network, config = self.network, self.detector.config
        if network.config.backbone == "resnet50":
            maps = FeatureMaps(dataclasses.replace(seen, pixels=_padded(seen.pixels, network.frame_multiple)))
        levels = network.features(maps, framed=True)
        boxes, logits, level_of = network.best_anchors(levels, *network.rpn.head(levels))
        boxes, logits = clip_boxes(boxes[0], seen.sizes), logits[0]
        logits = torch.where(valid_boxes(boxes, network.config.min_size), logits, -torch.inf)
        apart = boxes
        if not network.config.merge_levels:
            apart = boxes + (level_of * seen.sizes.sum())[:, None]
        kept = torch.ops.torchvision.nms(apart, logits, config.proposal_nms)
        kept = F.pad(kept, (0, config.max_proposals), value=-1)[: config.max_proposals]  # [P]
        boxes, logits, there = boxes[kept.clamp(min=0)], logits[kept.clamp(min=0)], kept >= 0
        index = torch.zeros_like(kept)
        return Regions(boxes, index, scores=logits.sigmoid(), logits=logits), there & logits.isfinite()

    def pick(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Suppresses over boxes [P, 4] and scores [P, C], negative where there is none; see `forward`.

        Each step takes the best pair of all names and lowers or drops what overlaps it under its name. As
        scores only fall and names do not see each other, S steps give the first S of the whole result.
        """
        config, count = self.detector.config, boxes.shape[0]
        soft = config.nms_type == "soft"
        floor = config.soft_nms_min_score if soft else 0.0
        overlaps = iou(boxes, boxes)  # [P, P]
        decay = (
            (-overlaps.square() / config.soft_nms_sigma).exp() if soft else (overlaps <= config.nms).float()
        )
        places = torch.arange(count)

        def step(table: Tensor, _: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            value, pair = table.flatten().max(0, keepdim=True)  # [1] each
            label, box = pair // count, pair % count
            row = table.index_select(0, label) * decay.index_select(0, box)  # [1, P]
            row = torch.where((places == box) | (row <= 0) | (row < floor), -1.0, row)
            names = torch.arange(table.shape[0])[:, None]
            return torch.where(names == label, row, table), (value, pair.clone())

        table = torch.where(scores < floor, -1.0, scores).T.contiguous()  # [C, P]
        _, (values, pairs) = scan(step, table, torch.zeros(config.max_detections, 1))  # [S, 1] each
        taken = values[:, 0] >= 0
        values, pairs = values[taken, 0], pairs[taken, 0]
        return boxes[pairs % count], values, pairs // count


def _padded(pixels: Tensor, multiple: int) -> Tensor:
    """Pads [1, 3, H, W] right and below with zeros to multiples."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple))
