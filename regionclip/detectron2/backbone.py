"""The trunk of CLIP's ResNet as one of detectron2's backbones."""

# B images, C channels, H and W padded height and width
from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from clip_base.models.resnet import EXPANSION, ModifiedResNet
from regionclip.detector import DetectorConfig
from regionclip.detectron2.weights import read_detector, trunk_of
from regionclip.region_text import freeze

STAGES = ("res2", "res3", "res4")  # detectron2's names of the maps after layer1, layer2 and layer3
TRUNK_STAGES = 4  # of `freeze`: the stem and three layers


@BACKBONE_REGISTRY.register()
class ClipBackbone(Backbone):  # type: ignore[misc]
    """Stem to layer3 of a CLIP's ResNet; takes pixels that are normalised for CLIP.

    Args:
        weights: a CLIP or a detector, see `read_detector`.
        freeze_at: stages kept as they are, counted as detectron2 does: 0 none, 1 the stem, 2 also layer1
            (res2), … 4 also layer3 (res4); what is beyond belongs to the RoI heads.
        freeze_batch_norm: keep the statistics and gains of batch norms as they are.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(self, weights: str, freeze_at: int = 2, freeze_batch_norm: bool = True) -> None:
        super().__init__()
        tower = trunk_of(read_detector(weights, DetectorConfig()).clip.visual)
        assert isinstance(tower, ModifiedResNet)
        freeze(tower, min(freeze_at, TRUNK_STAGES), freeze_batch_norm)
        self.tower = tower
        width = tower.trunk_channels // (4 * EXPANSION)
        self._out_features = list(STAGES)
        self._out_feature_strides = {name: 4 * 2**level for level, name in enumerate(STAGES)}
        self._out_feature_channels = {name: width * EXPANSION * 2**level for level, name in enumerate(STAGES)}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Takes MODEL.REGIONCLIP.WEIGHTS, MODEL.BACKBONE.FREEZE_AT and MODEL.RESNETS.NORM."""
        return {
            "weights": cfg.MODEL.REGIONCLIP.WEIGHTS,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "freeze_batch_norm": cfg.MODEL.RESNETS.NORM == "FrozenBN",
        }

    @property
    def size_divisibility(self) -> int:
        """Padded sides are multiples of 32 pixels, as in our own batches."""
        return 32

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps [B, 3, H, W] to {"res2": [B, C, H/4, W/4], "res3": …, "res4": [B, 4C, H/16, W/16]}."""
        return dict(zip(STAGES, self.tower.stages(pixels), strict=True))
