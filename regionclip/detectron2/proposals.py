"""Our proposal network as one of detectron2's proposal generators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from clip_base.runtime.errors import InputError
from regionclip.detectron2.backbone import STAGES, read_detector
from regionclip.detectron2.config import (
    ANCHOR_RATIOS,
    ANCHOR_SIZES,
    HEAD_CONVS,
    RPN_VALUES,
    network_options,
    require,
    stated,
)
from regionclip.detectron2.structures import from_images, from_truth, to_proposals
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import load_network
from regionclip.structures.regions import FeatureMaps, RegionBatch


@PROPOSAL_GENERATOR_REGISTRY.register()
class RegionProposals(nn.Module):
    """Proposes with our proposal network.

    One with a backbone of its own looks at the pixels and stays frozen (arXiv 2112.09106, section 4). One
    that stands on the CLIP's trunk takes the backbone's maps and is trained with it.

    Args:
        weights: the CLIP or the detector of the model, see `read_detector`.
        rpn: the proposal network's file; empty: the detector's own.
        limits: most proposals per image, in training and in testing.
        nms: IoU above which the lower scored of two proposals is dropped.
        pre_nms: best anchors per level that go into suppression, in training and in testing; None: the
            network's own.
        options: of `ProposalNetworkConfig`, in place of the network's own: sampling, losses, selection.
        objectness_weight: weight of the objectness loss; matters on the CLIP's trunk only.
        box_weight: weight of the box regression loss; matters on the CLIP's trunk only.
        said: what a config says of the network's sizes; an InputError where the network has others.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        weights: str,
        rpn: str = "",
        limits: Sequence[int] = (1000, 1000),
        nms: float = 0.7,
        objectness_weight: float = 1.0,
        box_weight: float = 1.0,
        pre_nms: Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
        said: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        detector = read_detector(weights, DetectorConfig())
        network = load_network(rpn, detector.clip.map_tower) if rpn else detector.network
        if network is None:
            raise InputError(
                f"{weights} is a CLIP without a proposal network; set MODEL.REGIONCLIP.RPN to one from "
                "`regionclip train-rpn`, or MODEL.PROPOSAL_GENERATOR.NAME to RPN"
            )
        require(said or {}, {**RPN_VALUES, **_sizes(network)}, "RegionProposals")
        self.network: ProposalNetwork = _with_options(network, options or {})
        self.network.requires_grad_(self.shares_trunk)
        self.limits, self.nms = {True: limits[0], False: limits[1]}, nms
        most = pre_nms or [self.network.config.pre_nms] * 2
        self.pre_nms = {True: most[0], False: most[1]}
        self.loss_weights = {"loss_rpn_cls": objectness_weight, "loss_rpn_loc": box_weight}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Takes MODEL.REGIONCLIP.{WEIGHTS,RPN} and MODEL.RPN; the network's sizes are in its file."""
        rpn = cfg.MODEL.RPN
        return {
            "weights": cfg.MODEL.REGIONCLIP.WEIGHTS,
            "rpn": cfg.MODEL.REGIONCLIP.RPN,
            "limits": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms": rpn.NMS_THRESH,
            "objectness_weight": rpn.LOSS_WEIGHT,
            "box_weight": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
            "pre_nms": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "options": network_options(cfg),
            "said": stated(cfg, [*RPN_VALUES, ANCHOR_SIZES, ANCHOR_RATIOS, HEAD_CONVS]),
        }

    @property
    def shares_trunk(self) -> bool:
        """Whether the network takes the backbone's maps."""
        return self.network.config.share_trunk

    def train(self, mode: bool = True) -> RegionProposals:
        """Sets the mode; the network, frozen or without batch norms, stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Returns each image's proposals, and the weighted losses, none for a frozen network.

        Args:
            images: normalized for CLIP.
            features: the backbone's; a network with a backbone of its own does not look at them.
            gt_instances: true boxes, in training.
        """
        batch, losses = from_images(images), {}
        maps = FeatureMaps(batch, tuple(features[name] for name in STAGES) if self.shares_trunk else ())
        if self.training and self.shares_trunk:
            assert gt_instances is not None
            found = self.network.losses(RegionBatch(batch, from_truth(gt_instances)), maps)
            values = {"loss_rpn_cls": found["objectness"], "loss_rpn_loc": found["box"]}
            losses = {name: self.loss_weights[name] * loss for name, loss in values.items()}
        limit, pre_nms = self.limits[self.training], self.pre_nms[self.training]
        regions = self.network.propose(maps, limit, self.nms, pre_nms=pre_nms)
        return to_proposals(regions, images.image_sizes), losses


def _sizes(network: ProposalNetwork) -> dict[str, Any]:
    """Returns what detectron2's keys would say of the network."""
    config = network.config
    count = len(config.anchor_sizes) // len(config.strides)
    starts = range(0, len(config.anchor_sizes), count)
    return {
        ANCHOR_SIZES: [config.anchor_sizes[start : start + count] for start in starts],
        ANCHOR_RATIOS: [config.ratios],
        HEAD_CONVS: [-1] * config.head_convs,
    }


def _with_options(network: ProposalNetwork, options: Mapping[str, Any]) -> ProposalNetwork:
    """Returns a network with the same weights and other options, which no size depends on."""
    changed = ProposalNetwork(dataclasses.replace(network.config, **options), network.shared_trunk)
    changed.load_state_dict(network.state_dict())
    return changed.to(memory_format=torch.channels_last)
