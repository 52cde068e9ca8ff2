"""Our proposal network as one of detectron2's proposal generators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from clip_base.errors import InputError
from clip_base.models.resnet import ModifiedResNet
from regionclip.detector import DetectorConfig
from regionclip.detectron2.backbone import STAGES
from regionclip.detectron2.structures import from_images, from_truth, to_proposals
from regionclip.detectron2.weights import read_detector
from regionclip.proposals.network import ProposalNetwork
from regionclip.proposals.rpn import load_network
from regionclip.structures import RegionBatch


@PROPOSAL_GENERATOR_REGISTRY.register()
class RegionProposals(nn.Module):
    """Proposes with our proposal network.

    One with a backbone of its own looks at the pixels and stays frozen (arXiv 2112.09106, section 4). One
    that stands on the CLIP's trunk takes the backbone's maps and is trained with it.

    Args:
        weights: the CLIP or the detector of the model, see `read_detector`.
        rpn: the proposal network's file; empty: the detector's own.
        limits: most proposals an image, in training and in testing.
        nms: IoU above which the lower scored of two proposals is dropped.
        objectness_weight: weight of the objectness loss; matters on the CLIP's trunk only.
        box_weight: weight of the box regression loss; matters on the CLIP's trunk only.
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
    ) -> None:
        super().__init__()
        detector = read_detector(weights, DetectorConfig())
        visual = detector.clip.visual
        assert isinstance(visual, ModifiedResNet)
        network = load_network(rpn, visual) if rpn else detector.network
        if network is None:
            raise InputError(
                f"{weights} is a CLIP without a proposal network; set MODEL.REGIONCLIP.RPN to one from "
                "`regionclip train-rpn`, or MODEL.PROPOSAL_GENERATOR.NAME to RPN"
            )
        self.network: ProposalNetwork = network
        self.network.requires_grad_(self.shares_trunk)
        self.limits, self.nms = {True: limits[0], False: limits[1]}, nms
        self.loss_weights = {"loss_rpn_cls": objectness_weight, "loss_rpn_loc": box_weight}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Takes MODEL.REGIONCLIP.{WEIGHTS,RPN} and how many from MODEL.RPN; its sizes are in the file."""
        rpn = cfg.MODEL.RPN
        return {
            "weights": cfg.MODEL.REGIONCLIP.WEIGHTS,
            "rpn": cfg.MODEL.REGIONCLIP.RPN,
            "limits": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms": rpn.NMS_THRESH,
            "objectness_weight": rpn.LOSS_WEIGHT,
            "box_weight": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
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
            images: normalised for CLIP.
            features: the backbone's; a network with a backbone of its own does not look at them.
            gt_instances: true boxes, in training.
        """
        batch, losses = from_images(images), {}
        maps = [features[name] for name in STAGES] if self.shares_trunk else None
        if self.training and self.shares_trunk:
            assert gt_instances is not None
            found = self.network.losses(RegionBatch(batch, from_truth(gt_instances)), maps)
            values = {"loss_rpn_cls": found["objectness"], "loss_rpn_loc": found["box"]}
            losses = {name: self.loss_weights[name] * loss for name, loss in values.items()}
        regions = self.network.propose(batch, self.limits[self.training], self.nms, maps=maps)
        return to_proposals(regions, images.image_sizes), losses
