"""The detector as one of detectron2's meta-architectures."""

# B images, H and W padded height and width
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN
from detectron2.structures import ImageList
from torch import nn

from clip_base.data.images import DEVIATION, MEAN, normalise
from clip_base.errors import InputError
from regionclip.detectron2.config import MODEL_VALUES, require, stated

RGB = {"RGB": (0, 1, 2), "BGR": (2, 1, 0)}  # where the channels of an input lie


@META_ARCH_REGISTRY.register()
class OpenVocabularyRCNN(GeneralizedRCNN):  # type: ignore[misc]
    """Backbone, proposals and RoI heads over pixels as CLIP wants them.

    Pixels are turned to RGB and normalised with CLIP's mean and deviation; MODEL.PIXEL_MEAN and PIXEL_STD,
    which belong to another backbone, are not read.

    Args:
        backbone: `ClipBackbone`, or one that takes the same pixels.
        proposal_generator: `RegionProposals`, or detectron2's own RPN on the backbone's maps.
        roi_heads: `OpenVocabularyROIHeads`.
        input_format: "RGB" or "BGR": the channels of the images that come in.
        vis_period: as in `GeneralizedRCNN`.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        input_format: str = "RGB",
        vis_period: int = 0,
    ) -> None:
        if input_format not in RGB:
            raise InputError(f"INPUT.FORMAT must be one of {', '.join(RGB)}, found {input_format!r}")
        super().__init__(
            backbone=backbone,
            proposal_generator=proposal_generator,
            roi_heads=roi_heads,
            pixel_mean=[255 * value for value in MEAN],
            pixel_std=[255 * value for value in DEVIATION],
            input_format=input_format,
            vis_period=vis_period,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds the parts that the config names.

        Raises:
            InputError: the config asks for masks, keypoints, proposals from a file or test-time augmentation.
        """
        require(stated(cfg, list(MODEL_VALUES)), MODEL_VALUES, "OpenVocabularyRCNN")
        parts: dict[str, Any] = super().from_config(cfg)
        return {key: value for key, value in parts.items() if not key.startswith("pixel_")}

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Returns the images in RGB, normalised for CLIP and padded."""
        channels = list(RGB[self.input_format])
        images = [normalise(item["image"].to(self.device)[channels]) for item in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    @property
    def names(self) -> tuple[str, ...]:
        """What is detected, in the order of `pred_classes`."""
        names: tuple[str, ...] = self.roi_heads.names
        return names

    @torch.no_grad()
    def set_vocabulary(self, names: Sequence[str], novel: Sequence[str] = ()) -> None:
        """Detects these names from now on; see `OpenVocabularyROIHeads.set_vocabulary`."""
        self.roi_heads.set_vocabulary(names, novel)
