"""The region proposal network (Faster R-CNN, arXiv 1506.01497, section 3), over one map or a feature pyramid.

Two backbones: the trunk of CLIP's ResNet, so that one backbone can serve proposals and embeddings, and
torchvision's ResNet-50. Sampling, losses, head and pyramid are torchvision's. Anchors and the choice of
proposals are our own: torchvision rounds anchors to whole pixels and derives strides from the padded size.
"""

# B images, C channels, h and w sides of a map, A anchors a cell, K anchors of an image over all levels
from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, batched_nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from clip_base.batch import ImageBatch
from clip_base.config import option
from clip_base.errors import InputError
from clip_base.models.configs import VisionConfig
from clip_base.models.resnet import EXPANSION, FrozenBatchNorm2d, ModifiedResNet, freeze_batch_norm
from regionclip.boxes import clip_boxes, decode_deltas, encode_deltas, valid_boxes
from regionclip.proposals.base import collect
from regionclip.structures import RegionBatch, Regions

BACKBONES = {"clip": (4, 8, 16), "resnet50": (4, 8, 16, 32)}  # strides of their maps, pixels
PYRAMID_CHANNELS = 256  # arXiv 1612.03144, section 3


@dataclass
class ProposalNetworkConfig:
    """Sizes of a proposal network, how it samples anchors in training and how it picks proposals.

    The defaults suit small pictures with objects of 20 to 80 pixels. The published networks at 800 pixels are
    `design=c4 strides=[16] ratios=[0.5,1,2] anchor_sizes=[32,64,128,256,512]` and
    `design=fpn strides=[4,8,16,32,64]` with the same sizes, both with `backbone=resnet50`.
    """

    backbone: str = option("clip", "clip (the trunk of CLIP's ResNet) or resnet50", choices=tuple(BACKBONES))
    vision: VisionConfig = option(VisionConfig(), "sizes of the CLIP trunk, when backbone=clip")
    backbone_weights: str = option("", "weights file to start the backbone from; empty: random weights")
    frozen_stages: int = option(
        0, "backbone stages kept as they are: 1 is the stem, 2 adds layer1, … 5 is all"
    )
    frozen_batch_norm: bool = option(False, "keep the backbone's batch statistics: for small batches")
    design: str = option("fpn", "c4 (one map of stride 16) or fpn (a pyramid)", choices=("c4", "fpn"))
    strides: list[int] = option([8, 16], "strides of the maps in pixels, each twice the one before")
    anchor_sizes: list[float] = option(
        [20.0, 32.0, 50.0, 80.0], "roots of the anchors' areas in pixels, dealt out evenly over the strides"
    )
    ratios: list[float] = option([0.5, 1.0, 2.0], "height of an anchor divided by its width")
    channels: int = option(0, "channels of pyramid and head; 0: 256 for fpn, the map's own for c4")
    positive_iou: float = option(0.7, "anchors that overlap a box at least so much are objects")
    negative_iou: float = option(0.3, "anchors that overlap every box less are background; between: not used")
    samples: int = option(256, "anchors an image in the loss")
    positive_share: float = option(0.5, "largest share of objects among the sampled anchors")
    pre_nms: int = option(1000, "best anchors a level that go into non-maximum suppression")
    nms: float = option(0.7, "IoU above which the lower scored of two proposals is dropped")
    merge_levels: bool = option(True, "suppress over all levels together; false: within each, as published")
    min_size: float = option(1.0, "proposals must be wider and higher than this, in pixels")

    def __post_init__(self) -> None:
        """Checks that the network can be built."""
        _require(self.backbone in BACKBONES, f"backbone must be clip or resnet50, got {self.backbone!r}")
        _require(
            self.backbone != "clip" or self.vision.kind == "resnet",
            "backbone=clip needs vision.kind=resnet: a vit has no trunk of stride 16",
        )
        maps = BACKBONES[self.backbone]
        doubling = all(b == 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False))
        if self.design == "c4":
            _require(self.strides == [16], f"design=c4 has one map: set strides=[16], got {self.strides}")
        else:
            _require(
                bool(self.strides)
                and self.strides[0] in maps
                and 16 <= self.strides[-1] <= 2 * maps[-1]
                and doubling,
                f"strides of a pyramid on {self.backbone} start at one of {list(maps)}, double, and end in "
                f"16…{2 * maps[-1]}; got {self.strides}",
            )
        _require(
            bool(self.anchor_sizes) and len(self.anchor_sizes) % len(self.strides) == 0,
            f"{len(self.anchor_sizes)} anchor_sizes cannot be split evenly over {len(self.strides)} strides",
        )
        _require(
            bool(self.ratios) and min(*self.anchor_sizes, *self.ratios) > 0,
            f"anchor_sizes and ratios must be above 0, got {self.anchor_sizes} and {self.ratios}",
        )
        _require(
            0 <= self.negative_iou <= self.positive_iou <= 1,
            f"0 ≤ negative_iou ≤ positive_iou ≤ 1 must hold, got {self.negative_iou} and {self.positive_iou}",
        )
        _require(
            self.samples > 0 and self.pre_nms > 0 and self.channels >= 0 and self.min_size >= 0,
            "samples and pre_nms must be above 0, channels and min_size not below it",
        )
        for name in ("positive_share", "nms"):
            _require(
                0 < getattr(self, name) <= 1,
                f"{name} must be above 0 and at most 1, got {getattr(self, name)}",
            )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


class ResNet50(nn.Module):
    """torchvision's ResNet-50 without its classifier, with the `stages` of CLIP's ResNet."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        whole = resnet50(weights=None)
        self.conv1, self.bn1, self.maxpool = whole.conv1, whole.bn1, whole.maxpool
        self.names = [f"layer{number}" for number in range(1, stages + 1)]
        for name in self.names:
            self.add_module(name, getattr(whole, name))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Returns the maps after layer1, layer2, …: strides 4, 8, 16 and, when there are four, 32 pixels."""
        x = images.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        maps = []
        for name in self.names:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps


class ProposalNetwork(nn.Module):
    """Says where objects may be, whatever they are.

    Attributes:
        config: what it was built from.
        backbone: makes the maps.
        levels: how many maps the head looks at.
    """

    backbone: ModifiedResNet | ResNet50

    def __init__(self, config: ProposalNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = len(config.strides)
        self.backbone, channels = _backbone(config)
        maps = BACKBONES[config.backbone]
        self._taken = [maps.index(stride) for stride in config.strides if stride in maps]
        taken = [channels[index] for index in self._taken]
        self.neck: nn.Module
        if config.design == "fpn":
            width = config.channels or PYRAMID_CHANNELS
            extra = LastLevelMaxPool() if config.strides[-1] > maps[-1] else None
            self.neck = FeaturePyramidNetwork(taken, width, extra)
        else:
            width = config.channels or taken[0]
            self.neck = nn.Identity() if width == taken[0] else nn.Conv2d(taken[0], width, 1)
        sizes = len(config.anchor_sizes) // self.levels
        self._shapes = [
            _anchor_shapes(config.anchor_sizes[level * sizes : (level + 1) * sizes], config.ratios)
            for level in range(self.levels)
        ]
        self.rpn = RegionProposalNetwork(
            anchor_generator=None,
            head=RPNHead(width, sizes * len(config.ratios)),
            fg_iou_thresh=config.positive_iou,
            bg_iou_thresh=config.negative_iou,
            batch_size_per_image=config.samples,
            positive_fraction=config.positive_share,
            pre_nms_top_n={},
            post_nms_top_n={},
            nms_thresh=config.nms,
        )
        _freeze(self.backbone, config)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Returns the head's maps, [B, C, h, w] a level, of [B, 3, H, W] pixels normalised as for CLIP."""
        maps = self.backbone.stages(pixels)
        if self.config.design == "c4":
            return [self.neck(maps[self._taken[0]])]
        pyramid = self.neck(OrderedDict((str(index), maps[index]) for index in self._taken))
        return list(pyramid.values())

    def losses(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Returns the unweighted losses of a batch in float32; which class a box is of does not matter.

        Anchors whose centre lies in the padding are not used, nor are boxes without area.

        Returns:
            `objectness`, binary cross entropy of the sampled anchors, and `box`, the smooth L1 loss of the
            objects among them, divided by the number of all sampled ones.
        """
        maps = self.features(batch.images.pixels)
        logits, deltas = self.rpn.head(maps)
        with torch.autocast(batch.images.pixels.device.type, enabled=False):
            logits, deltas = concat_box_prediction_layers(logits, deltas)  # [B·K, 1], [B·K, 4]
            anchors = torch.cat(self.anchors(maps))  # [K, 4]
            regions = batch.regions[valid_boxes(batch.regions.boxes)]
            truth = [{"boxes": regions.of_image(index).boxes} for index in range(len(batch.images))]
            labels, matched = self.rpn.assign_targets_to_anchors([anchors] * len(truth), truth)
            centres = (anchors[:, :2] + anchors[:, 2:]) / 2  # [K, 2] x, y
            targets = []
            for label, boxes, size in zip(labels, matched, batch.images.sizes.flip(-1), strict=True):
                label[(centres >= size).any(-1)] = -1
                # Only objects are regressed; background has no box to encode.
                targets.append(encode_deltas(anchors, torch.where((label == 1)[:, None], boxes, anchors)))
            objectness, box = self.rpn.compute_loss(logits.float(), deltas.float(), labels, targets)
        return {"objectness": objectness, "box": box}

    @torch.no_grad()
    def propose(
        self, images: ImageBatch, limit: int, nms: float | None = None, min_score: float = 0.0
    ) -> Regions:
        """Returns the boxes most like objects.

        Args:
            images: B images, normalised as for CLIP.
            limit: most boxes an image.
            nms: IoU above which the lower scored of two boxes is dropped; None: the config's.
            min_score: boxes scored lower are left out.

        Returns:
            boxes in the batch's frame and inside each image's unpadded size, sorted by image, then by falling
            score; `scores` are objectness probabilities in [0, 1].
        """
        if self.training:
            raise ValueError("proposals of a network in training mode change its statistics; call eval()")
        maps = self.features(images.pixels)
        logits, deltas = self.rpn.head(maps)
        with torch.autocast(images.pixels.device.type, enabled=False):
            boxes, scores, levels = self._best(maps, logits, deltas)
            kept = [
                self._pick(boxes[index], scores[index], levels, size, limit, nms, min_score)
                for index, size in enumerate(images.sizes)
            ]
        return collect([boxes for boxes, _ in kept], [scores for _, scores in kept], images.pixels.device)

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """Returns [h·w·A, 4] anchors a level in the batch's frame: row by row, and all of a cell together."""
        anchors = []
        for level, stride, shapes in zip(maps, self.config.strides, self._shapes, strict=True):
            height, width = level.shape[-2:]
            y = torch.arange(height, device=level.device, dtype=torch.float32) * stride
            x = torch.arange(width, device=level.device, dtype=torch.float32) * stride
            shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)  # [h, w, 4]
            anchors.append((shifts[:, :, None] + shapes.to(level.device)).reshape(-1, 4))
        return anchors

    def _best(
        self, maps: list[Tensor], logits: list[Tensor], deltas: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the levels' best anchors, decoded: boxes [B, k, 4], probabilities [B, k], levels [k]."""
        boxes, scores, levels = [], [], []
        for level, anchors in enumerate(self.anchors(maps)):
            count, _, height, width = logits[level].shape
            flat = logits[level].float().permute(0, 2, 3, 1).flatten(1)  # [B, h·w·A]
            moves = deltas[level].float().reshape(count, -1, 4, height, width)
            moves = moves.permute(0, 3, 4, 1, 2).reshape(count, -1, 4)  # [B, h·w·A, 4]
            best, index = flat.topk(min(self.config.pre_nms, flat.shape[1]), dim=1)  # [B, k]
            moves = moves.gather(1, index[..., None].expand(-1, -1, 4))
            decoded = decode_deltas(anchors[index].flatten(0, 1), moves.flatten(0, 1))
            boxes.append(decoded.reshape(count, -1, 4))
            scores.append(best.sigmoid())
            levels.append(torch.full((best.shape[1],), level, device=best.device))
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels)

    def _pick(
        self,
        boxes: Tensor,
        scores: Tensor,
        levels: Tensor,
        size: Tensor,
        limit: int,
        nms: float | None,
        min_score: float,
    ) -> tuple[Tensor, Tensor]:
        """Returns one image's proposals [n, 4] and scores [n], best first."""
        boxes = clip_boxes(boxes, size)
        keep = valid_boxes(boxes, self.config.min_size) & (scores >= min_score)
        boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        if self.config.merge_levels:
            levels = torch.zeros_like(levels)
        index = batched_nms(boxes, scores, levels, self.config.nms if nms is None else nms)[:limit]
        return boxes[index], scores[index]


def _backbone(config: ProposalNetworkConfig) -> tuple[ModifiedResNet | ResNet50, list[int]]:
    """Returns the backbone with random weights, without what makes no map, and each map's channels."""
    if config.backbone == "resnet50":
        stages = 4 if max(config.strides) >= 32 else 3
        return ResNet50(stages), [256 * 2**stage for stage in range(stages)]
    trunk = ModifiedResNet(config.vision, embed_dim=1)
    del trunk.layer4, trunk.attnpool
    return trunk, [config.vision.width * 2**stage * EXPANSION for stage in range(3)]


def _anchor_shapes(sizes: list[float], ratios: list[float]) -> Tensor:
    """Returns [A, 4] anchors around the origin, in pixels: all ratios of the first size, then of the next."""
    rows = []
    for size in sizes:
        for ratio in ratios:
            width = size / math.sqrt(ratio)
            height = width * ratio
            rows.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(rows, dtype=torch.float32)


def _freeze(backbone: nn.Module, config: ProposalNetworkConfig) -> None:
    """Freezes the first stages and, when asked for, all batch norms."""
    for name, child in list(backbone.named_children()):
        stage = int(name.removeprefix("layer")) + 1 if name.startswith("layer") else 1
        if stage <= config.frozen_stages:
            child.requires_grad_(False)
        if stage <= config.frozen_stages or config.frozen_batch_norm:
            if isinstance(child, nn.BatchNorm2d):
                setattr(backbone, name, FrozenBatchNorm2d(child))
            else:
                freeze_batch_norm(child)
