"""Proposals of a detectron2 model's own region proposal network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_base.batch import ImageBatch
from clip_base.config import REQUIRED, option
from clip_base.data.images import DEVIATION, MEAN
from regionclip.proposals.base import ImageKey, SelectionConfig
from regionclip.structures import Regions

PARTS = ("backbone.", "proposal_generator.")  # what proposing needs of a model


@dataclass
class Detectron2Config(SelectionConfig):
    """Options of the proposer `detectron2`."""

    config: str = option(
        REQUIRED, "the model's YAML or LazyConfig (.py), a file or a name in detectron2's model zoo"
    )
    weights: str = option("", "its weights, a file or an address; empty: those that the config names")
    overrides: list[str] = option(
        [], "key and value, alternating, over the YAML; key=value over a LazyConfig"
    )


class Detectron2Proposer:
    """Proposes what a detectron2 model's region proposal network takes for objects.

    Any model with a backbone and a proposal generator will do, such as a Faster or Mask R-CNN. It sees the
    batch's pixels, which the job resizes, in its own format and normalisation.

    Args:
        config: the model and what to keep of its proposals.
        device: where it runs; batches must be there too.
    """

    def __init__(self, config: Detectron2Config, device: str | torch.device = "cpu") -> None:
        from regionclip.detectron2 import models

        self.config = config
        self.model, self.format = models.load(config.config, config.weights, config.overrides, PARTS, device)
        generator = self.model.proposal_generator
        if hasattr(generator, "post_nms_topk"):  # detectron2's RPN and what is made of it
            generator.post_nms_topk, generator.nms_thresh = {False: config.limit}, config.nms

    @torch.no_grad()
    def __call__(self, images: ImageBatch, keys: Sequence[ImageKey]) -> Regions:
        """See `Proposer`. The network looks at pixels only; `keys` are not needed."""
        from regionclip.detectron2.structures import from_proposals

        batch = self._preprocess([self._pixels(images, slot) for slot in range(len(images))])
        proposals, _ = self.model.proposal_generator(batch, self.model.backbone(batch.tensor), None)
        regions = from_proposals([found[: self.config.limit] for found in proposals])
        assert regions.scores is not None
        return regions[regions.scores >= self.config.min_score]

    def _preprocess(self, images: list[Tensor]) -> Any:
        """Returns detectron2's padded batch, normalised as the model wants it."""
        from detectron2.structures import ImageList

        model = self.model
        if hasattr(model, "preprocess_image"):
            return model.preprocess_image([{"image": image} for image in images])
        # Its meta-architecture ProposalNetwork does this within `forward`.
        normalised = [(image - model.pixel_mean) / model.pixel_std for image in images]
        backbone = model.backbone
        return ImageList.from_tensors(
            normalised, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
        )

    def _pixels(self, images: ImageBatch, slot: int) -> Tensor:
        """Returns one image without padding as its file holds it: [3, h, w] in 0…255, float32."""
        height, width = images.sizes[slot].tolist()
        image = images.pixels[slot, :, :height, :width]
        mean, deviation = (255 * image.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        pixels = (image * deviation + mean).round().clamp(0, 255)
        return pixels.flip(0) if self.format == "BGR" else pixels
