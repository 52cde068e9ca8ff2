"""Options of a proposal network, which are stored with its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from clip_base.jobs.config import option
from clip_base.models.configs import VisionConfig
from clip_base.runtime.errors import InputError, quote
from regionclip.proposals.rpn.backbone import BACKBONES

FORMAT = "regionclip.proposals/1"  # of a file that holds a network, and its config as metadata


@dataclass
class ProposalHeadConfig:
    """A proposal network without its backbone: neck, anchors, how it samples them and how it picks proposals.

    The defaults suit small images with objects of 20 to 80 pixels. The published networks are written down
    in `configs/region-train-rpn`: coco_c4.yaml, lvis_fpn.yaml, lvis_fpn_lsj.yaml.
    """

    design: str = option("fpn", "c4 (one map of stride 16) or fpn (a pyramid)", choices=("c4", "fpn"))
    strides: list[int] = option([8, 16], "strides of the maps in pixels, each twice the one before")
    anchor_sizes: list[float] = option(
        [20.0, 32.0, 50.0, 80.0],
        "square roots of the anchors' areas in pixels, divided evenly over the strides",
    )
    ratios: list[float] = option([0.5, 1.0, 2.0], "height of an anchor divided by its width")
    channels: int = option(0, "channels of pyramid and head; 0: 256 for fpn, the map's own for c4")
    pyramid_norm: bool = option(False, "batch norms in the pyramid, as in detectron2's large-scale jitter")
    head_convs: int = option(1, "3x3 convolutions of the head")
    positive_iou: float = option(0.7, "anchors with at least this IoU with a box are objects")
    negative_iou: float = option(
        0.3, "anchors with a lower IoU with every box are background; those between are ignored"
    )
    samples: int = option(256, "anchors per image in the loss")
    positive_fraction: float = option(
        0.5, "maximum fraction of objects among the sampled anchors", renamed_from="positive_share"
    )
    smooth_l1_beta: float = option(
        0.0, "smooth L1 beta of the box loss; 0: L1, as in detectron2; torchvision: 1/9"
    )
    pre_nms: int = option(1000, "best anchors per level that enter non-maximum suppression")
    nms: float = option(0.7, "IoU above which the lower scored of two proposals is dropped")
    merge_levels: bool = option(
        True, "suppress over all levels together; false: within each level, as published"
    )
    min_size: float = option(1.0, "proposals must be wider and higher than this, in pixels")

    def __post_init__(self) -> None:
        """Checks what does not depend on the backbone."""
        if self.design == "c4":
            _require(
                self.strides == [16], f"design=c4 has one map: set strides=[16], got {quote(self.strides)}"
            )
        _require(
            bool(self.anchor_sizes) and len(self.anchor_sizes) % max(len(self.strides), 1) == 0,
            f"{len(self.anchor_sizes)} anchor_sizes cannot be split evenly over {len(self.strides)} strides",
        )
        _require(
            bool(self.ratios) and min(*self.anchor_sizes, *self.ratios) > 0,
            f"anchor_sizes and ratios must be above 0, got {quote(self.anchor_sizes)} and "
            f"{quote(self.ratios)}",
        )
        _require(
            0 <= self.negative_iou <= self.positive_iou <= 1,
            f"0 ≤ negative_iou ≤ positive_iou ≤ 1 must hold, got {self.negative_iou} and {self.positive_iou}",
        )
        _require(
            min(self.samples, self.pre_nms) > 0 <= min(self.channels, self.min_size, self.smooth_l1_beta),
            "samples and pre_nms must be above 0, channels, min_size and smooth_l1_beta not below it",
        )
        _require(self.head_convs > 0, f"head_convs must be at least 1, got {self.head_convs}")
        _require(self.design == "fpn" or not self.pyramid_norm, "pyramid_norm=true needs design=fpn")
        for name in ("positive_fraction", "nms"):
            _require(
                0 < getattr(self, name) <= 1,
                f"{name} must be above 0 and at most 1, got {getattr(self, name)}",
            )


@dataclass
class ProposalNetworkOptions(ProposalHeadConfig):
    """A whole proposal network to train."""

    backbone: str = option("clip", "clip (the trunk of CLIP's ResNet) or resnet50", choices=tuple(BACKBONES))
    share_trunk: bool = option(
        False, "use the frozen trunk of the CLIP that uses the proposals, instead of a copy of it"
    )
    backbone_weights: str = option(
        "",
        "file to start the backbone from: a CLIP; for resnet50 torchvision's, detectron2's R-50.pkl, or a "
        "proposal network on one; empty: random weights",
    )
    frozen_stages: int = option(0, "frozen backbone stages: 1 the stem, 2 also layer1, … 5 all")
    frozen_batch_norm: bool = option(False, "freeze the backbone's batch norms, for small batches")

    def __post_init__(self) -> None:
        """Checks that the network can be built."""
        super().__post_init__()
        _require(self.backbone in BACKBONES, f"backbone must be clip or resnet50, got {quote(self.backbone)}")
        _require(
            self.backbone == "clip" or not self.share_trunk,
            "share_trunk=true needs backbone=clip: it is CLIP's trunk that is shared",
        )
        if self.design == "fpn":
            maps = BACKBONES[self.backbone]
            doubling = all(b == 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False))
            _require(
                bool(self.strides)
                and self.strides[0] in maps
                and 16 <= self.strides[-1] <= 2 * maps[-1]
                and doubling,
                f"strides of a pyramid on {self.backbone} start at one of {list(maps)}, double, and end in "
                f"16…{2 * maps[-1]}; got {quote(self.strides)}",
            )


@dataclass
class ProposalNetworkConfig(ProposalNetworkOptions):
    """A proposal network as it is stored: its options, and facts about its backbone's weights.

    Attributes:
        vision: sizes of the CLIP whose trunk it is, when backbone=clip.
        stride_in_1x1: resnet50: stride 2 in the 1x1 convolutions, as in MSRA's weights.
        pixels: input of resnet50: clip (RGB, normalized) or caffe (BGR in 0…255 minus its mean).
    """

    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    stride_in_1x1: bool = False
    pixels: str = "clip"

    def __post_init__(self) -> None:
        """Checks that the facts fit the backbone."""
        super().__post_init__()
        _require(
            self.backbone != "clip" or self.vision.kind == "resnet",
            "backbone=clip needs a CLIP with a resnet: a vit has no trunk of stride 16",
        )
        _require(self.pixels in ("clip", "caffe"), f"pixels must be clip or caffe, got {quote(self.pixels)}")
        _require(
            self.backbone == "resnet50" or (self.pixels == "clip" and not self.stride_in_1x1),
            "stride_in_1x1 and pixels=caffe need backbone=resnet50",
        )

    @classmethod
    def of(cls, options: ProposalHeadConfig, **facts: Any) -> ProposalNetworkConfig:
        """Returns the config of a network with these options, and with facts in place of theirs."""
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        return cls(**{**values, **facts})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
