"""The region proposal network (Faster R-CNN, arXiv 1506.01497, section 3), over one map or a feature pyramid.

Two backbones: the trunk of CLIP's ResNet, so that one backbone can serve proposals and embeddings, and
torchvision's ResNet-50. Sampling, head and pyramid are torchvision's. The losses are detectron2's. Anchors
and the choice of proposals are our own: torchvision rounds anchors to whole pixels and derives strides from
the padded size.
"""

# B images, C channels, h and w sides of a map, A anchors a cell, K anchors of an image over all levels
from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from clip_base.data.batch import ImageBatch
from clip_base.models.resnet import ModifiedResNet
from clip_base.runtime import distributed
from regionclip.proposals.base import collect
from regionclip.proposals.rpn.backbone import (
    BACKBONES,
    ResNet50,
    caffe_pixels,
    channels_of,
    clip_trunk,
    fit_frame,
    freeze_stages,
)
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.structures.boxes import best_survivors, clip_boxes, decode_deltas, encode_deltas, valid_boxes
from regionclip.structures.regions import FeatureMaps, RegionBatch, Regions

PYRAMID_CHANNELS = 256  # arXiv 1612.03144, section 3


class ProposalNetwork(nn.Module):
    """Says where objects may be, whatever they are.

    With `config.share_trunk` the trunk belongs to a CLIP: it is held but not registered, so that the weights,
    modes and moves of the network are those of neck and head, and the CLIP's are its own affair.

    Args:
        config: sizes and choices.
        trunk: the CLIP's vision tower when the trunk is shared, else None.

    Attributes:
        config: what it was built from.
        levels: how many maps the head looks at.
        anchor_shapes: [A, 4] a level, the anchors of a cell around its corner, in pixels.
    """

    backbone: ModifiedResNet | ResNet50 | None

    def __init__(self, config: ProposalNetworkConfig, trunk: ModifiedResNet | None = None) -> None:
        super().__init__()
        if config.share_trunk != (trunk is not None):
            raise ValueError(
                f"a network with share_trunk={config.share_trunk} got "
                + ("no trunk" if trunk is None else "a trunk")
            )
        self.config = config
        self.levels = len(config.strides)
        channels = channels_of(config.backbone, config.vision)
        if trunk is not None and trunk.trunk_channels != channels[-1]:
            raise ValueError(
                f"the trunk has {trunk.trunk_channels} channels, config.vision.width={config.vision.width} "
                f"makes {channels[-1]}"
            )
        # In a tuple, because a module that is an attribute would be registered.
        self._shared: tuple[ModifiedResNet, ...] = () if trunk is None else (trunk,)
        self.backbone = None if trunk is not None else _own_backbone(config)
        maps = BACKBONES[config.backbone]
        self._taken = [maps.index(stride) for stride in config.strides if stride in maps]
        taken = [channels[index] for index in self._taken]
        self.neck: nn.Module
        if config.design == "fpn":
            width = config.channels or PYRAMID_CHANNELS
            extra = LastLevelMaxPool() if config.strides[-1] > maps[-1] else None
            norm = nn.BatchNorm2d if config.pyramid_norm else None
            self.neck = FeaturePyramidNetwork(taken, width, extra, norm)
        else:
            width = config.channels or taken[0]
            self.neck = nn.Identity() if width == taken[0] else nn.Conv2d(taken[0], width, 1)
        self.anchor_shapes = anchor_shapes(config)
        self.rpn = RegionProposalNetwork(
            anchor_generator=None,
            head=RPNHead(width, len(self.anchor_shapes[0]), config.head_convs),
            fg_iou_thresh=config.positive_iou,
            bg_iou_thresh=config.negative_iou,
            batch_size_per_image=config.samples,
            positive_fraction=config.positive_fraction,
            pre_nms_top_n={},
            post_nms_top_n={},
            nms_thresh=config.nms,
        )

    @property
    def trunk(self) -> ModifiedResNet | ResNet50:
        """What makes the maps: the network's own backbone, or the CLIP's trunk."""
        return self._shared[0] if self.backbone is None else self.backbone

    @property
    def frame_multiple(self) -> int:
        """What the sides of a resnet50's frame are multiples of, in pixels; a CLIP trunk takes any frame.

        As detectron2 pads: a single map needs no even sides, a pyramid's maps must halve evenly.
        """
        return 1 if self.config.design == "c4" else BACKBONES["resnet50"][max(self._taken)]

    def stages(self, images: ImageBatch, framed: bool = False) -> list[Tensor]:
        """Returns the trunk's maps, [B, C, h, w] each: strides 4, 8, 16 and, of a whole resnet50, 32.

        Args:
            images: B images.
            framed: whether they are in the frame that they are to be seen in; else a resnet50 is shown the
                smallest that fits them.
        """
        if self.config.backbone == "clip":
            return self.trunk.stages(images.pixels)
        images = images if framed else fit_frame(images, self.frame_multiple)
        return self.trunk.stages(caffe_pixels(images) if self.config.pixels == "caffe" else images.pixels)

    @property
    def shared_trunk(self) -> ModifiedResNet | None:
        """The CLIP's vision tower that it stands on; None with a backbone of its own."""
        return self._shared[0] if self._shared else None

    def features(self, seen: ImageBatch | FeatureMaps, framed: bool = False) -> list[Tensor]:
        """Returns the head's maps, [B, C, h, w] a level.

        Args:
            seen: B images, normalized as for CLIP; or with the shared trunk's maps of them, so that one pass
                serves proposals and embeddings. A network with a backbone of its own ignores these.
            framed: see `stages`.

        Raises:
            ValueError: maps that the network needs are not among them.
        """
        if not isinstance(seen, FeatureMaps):
            maps = self.stages(seen, framed)
        elif self.shared_trunk is None:
            maps = self.stages(seen.images, framed)
        elif len(seen.levels) > max(self._taken):
            maps = list(seen.levels)
        else:
            raise ValueError(f"the network needs {max(self._taken) + 1} maps, got {len(seen.levels)}")
        if self.config.design == "c4":
            return [self.neck(maps[self._taken[0]])]
        pyramid = self.neck(OrderedDict((str(index), maps[index]) for index in self._taken))
        return list(pyramid.values())

    def losses(self, batch: RegionBatch, maps: FeatureMaps | None = None) -> dict[str, Tensor]:
        """Returns the unweighted losses of a batch in float32; which class a box is of does not matter.

        Those of detectron2: anchors in the padding of a smaller image count as background, too (its
        ANCHOR_BOUNDARY_THRESH of -1). Boxes without area are not used.

        Args:
            batch: images and true boxes.
            maps: of the batch's images, see `features`, into which gradients flow; None: they are made.

        Returns:
            `objectness`, the sum of the binary cross entropies of the sampled anchors, and `box`, the sum of
            the (smooth) L1 losses of the objects among them; each divided by `config.samples` per image, even
            where fewer anchors could be sampled.
        """
        levels = self.features(batch.images if maps is None else maps)
        logits, deltas = self.rpn.head(levels)
        with torch.autocast(batch.images.pixels.device.type, enabled=False):
            logits, deltas = concat_box_prediction_layers(logits, deltas)  # [B·K, 1], [B·K, 4]
            anchors = torch.cat(self.anchors(levels))  # [K, 4]
            regions = batch.regions[valid_boxes(batch.regions.boxes)]
            truth = [{"boxes": regions.of_image(index).boxes} for index in range(len(batch.images))]
            labels, matched = self.rpn.assign_targets_to_anchors([anchors] * len(truth), truth)
            positive, negative = (torch.cat(masks) for masks in self._sample(labels))  # [B·K] 0, 1
            objects, sampled = positive.bool(), (positive + negative).bool()
            wanted = encode_deltas(anchors.repeat(len(truth), 1)[objects], torch.cat(matched)[objects])
            beta, count = self.config.smooth_l1_beta, self.config.samples * len(truth)
            box = F.smooth_l1_loss(deltas.float()[objects], wanted, reduction="sum", beta=beta)
            found, is_object = logits.float().flatten()[sampled], objects[sampled].float()
            objectness = F.binary_cross_entropy_with_logits(found, is_object, reduction="sum")
        return {"objectness": objectness / count, "box": box / count}

    def _sample(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Chooses the anchors that losses are computed of; several processes choose together what one would.

        Args:
            labels: of each image [K]: 1 is an object, 0 background, -1 neither.

        Returns:
            Of each image [K], 0 or 1: the chosen objects, and the chosen background.
        """
        here = torch.tensor([[int((label >= 1).sum()), int((label == 0).sum())] for label in labels])
        first = distributed.rank() * len(labels)
        chosen: list[tuple[Tensor, Tensor]] = []
        for image, counts in enumerate(distributed.gather(here.to(labels[0].device)).tolist()):
            if first <= image < first + len(labels):
                chosen += zip(*self.rpn.fg_bg_sampler([labels[image - first]]), strict=True)
            else:
                for count in counts:  # the same draws in all processes
                    torch.randperm(count, device=labels[0].device)
        objects, background = zip(*chosen, strict=True)
        return list(objects), list(background)

    @torch.no_grad()
    def propose(
        self,
        seen: ImageBatch | FeatureMaps,
        limit: int,
        nms: float | None = None,
        min_score: float = 0.0,
        pre_nms: int | None = None,
    ) -> Regions:
        """Returns the boxes most like objects.

        Args:
            seen: see `features`.
            limit: most boxes per image.
            nms: IoU above which the lower scored of two boxes is dropped; None: the config's.
            min_score: boxes scored lower are left out.
            pre_nms: best anchors per level that go into non-maximum suppression; None: the config's.

        Returns:
            boxes in the batch's frame and inside each image's unpadded size, sorted by image, then by falling
            score; `scores` are objectness probabilities in [0, 1], `logits` the same before the sigmoid.
        """
        if self.training:
            raise ValueError(
                "the network is in training mode, where proposals would change its statistics; call eval()"
            )
        images = seen.images if isinstance(seen, FeatureMaps) else seen
        levels = self.features(seen)
        logits, deltas = self.rpn.head(levels)
        with torch.autocast(images.pixels.device.type, enabled=False):
            boxes, best, level_of = self.best_anchors(levels, logits, deltas, pre_nms)
            kept = [
                self._pick(boxes[index], best[index], level_of, size, limit, nms, min_score)
                for index, size in enumerate(images.sizes)
            ]
        found = collect([boxes for boxes, _ in kept], [logits for _, logits in kept], images.pixels.device)
        assert found.scores is not None
        return dataclasses.replace(found, scores=found.scores.sigmoid(), logits=found.scores)

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """Returns [h·w·A, 4] anchors a level in the batch's frame: row by row, and all of a cell together."""
        anchors = []
        for level, stride, shapes in zip(maps, self.config.strides, self.anchor_shapes, strict=True):
            height, width = level.shape[-2:]
            y = torch.arange(height, device=level.device, dtype=torch.float32) * stride
            x = torch.arange(width, device=level.device, dtype=torch.float32) * stride
            shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)  # [h, w, 4]
            anchors.append((shifts[:, :, None] + shapes.to(level.device)).reshape(-1, 4))
        return anchors

    def best_anchors(
        self, maps: list[Tensor], logits: list[Tensor], deltas: list[Tensor], pre_nms: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the levels' best anchors, decoded: boxes [B, k, 4], logits [B, k], levels [k]."""
        most = pre_nms or self.config.pre_nms
        boxes, scores, levels = [], [], []
        for level, anchors in enumerate(self.anchors(maps)):
            count, _, height, width = logits[level].shape
            flat = logits[level].float().permute(0, 2, 3, 1).flatten(1)  # [B, h·w·A]
            moves = deltas[level].float().reshape(count, -1, 4, height, width)
            moves = moves.permute(0, 3, 4, 1, 2).reshape(count, -1, 4)  # [B, h·w·A, 4]
            best, index = flat.topk(torch.sym_min(most, flat.shape[1]), dim=1)  # [B, k]
            moves = moves.gather(1, index[..., None].expand(-1, -1, 4))
            decoded = decode_deltas(anchors[index].flatten(0, 1), moves.flatten(0, 1))
            boxes.append(decoded.reshape(count, -1, 4))
            scores.append(best)
            levels.append(torch.full((best.shape[1],), level, device=best.device))
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels)

    def _pick(
        self,
        boxes: Tensor,
        logits: Tensor,
        levels: Tensor,
        size: Tensor,
        limit: int,
        nms: float | None,
        min_score: float,
    ) -> tuple[Tensor, Tensor]:
        """Returns one image's proposals [n, 4] and logits [n], best first."""
        boxes = clip_boxes(boxes, size)
        keep = valid_boxes(boxes, self.config.min_size) & (logits.sigmoid() >= min_score)
        boxes, logits, levels = boxes[keep], logits[keep], levels[keep]
        if self.config.merge_levels:
            levels = torch.zeros_like(levels)
        # By logits: probabilities near 1 are equal in float32 where their logits are not.
        index = best_survivors(boxes, logits, levels, self.config.nms if nms is None else nms, limit)
        return boxes[index], logits[index]


def _own_backbone(config: ProposalNetworkConfig) -> ModifiedResNet | ResNet50:
    """Returns the backbone with random weights, without what makes no map, frozen as the config says."""
    backbone: ModifiedResNet | ResNet50
    if config.backbone == "clip":
        backbone = clip_trunk(config.vision)
    else:
        backbone = ResNet50(4 if max(config.strides) >= 32 else 3, config.stride_in_1x1)
    freeze_stages(backbone, config.frozen_stages, config.frozen_batch_norm)
    return backbone


def anchor_shapes(config: ProposalNetworkConfig) -> list[Tensor]:
    """Returns [A, 4] anchors a level around the origin, in pixels: all ratios of a size, then of the next."""
    sizes = len(config.anchor_sizes) // len(config.strides)
    rows = []
    for size in config.anchor_sizes:
        for ratio in config.ratios:
            width = size / math.sqrt(ratio)
            height = width * ratio
            rows.append((-width / 2, -height / 2, width / 2, height / 2))
    return list(torch.split(torch.tensor(rows, dtype=torch.float32), sizes * len(config.ratios)))
