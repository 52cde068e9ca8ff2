"""Proposals of a detectron2 model's own region proposal network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch import Tensor, nn

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import DEVIATION, MEAN
from clip_base.jobs.config import REQUIRED, option
from clip_base.runtime.errors import InputError
from regionclip.detectron2.config import add_regionclip_config
from regionclip.detectron2.structures import from_proposals
from regionclip.proposals.base import SelectionConfig
from regionclip.structures.regions import ImageInfo, Regions

PARTS = ("backbone.", "proposal_generator.")  # what proposing needs of a model


@dataclass
class Detectron2Config(SelectionConfig):
    """Options of the proposer `detectron2`."""

    config: str = option(
        REQUIRED, "the model's YAML or LazyConfig (.py), a file or a name in detectron2's model zoo"
    )
    weights: str = option("", "weights file or URL; empty: those named in the config")
    overrides: list[str] = option(
        [], "overrides of the config: key and value alternating for a YAML, key=value for a LazyConfig"
    )


class Detectron2Proposer:
    """Proposes what a detectron2 model's region proposal network takes for objects.

    Any model with a backbone and a proposal generator will do, such as a Faster or Mask R-CNN. It sees the
    batch's pixels, which the job resizes, in its own format and normalization.

    Args:
        config: the model and what to keep of its proposals.
        device: where it runs; batches must be there too.
    """

    def __init__(self, config: Detectron2Config, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.model, self.format = load(config.config, config.weights, config.overrides, PARTS, device)
        generator = self.model.proposal_generator
        if hasattr(generator, "post_nms_topk"):  # detectron2's RPN and what is made of it
            generator.post_nms_topk, generator.nms_thresh = {False: config.limit}, config.nms

    @torch.no_grad()
    def __call__(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> Regions:
        """See `Proposer`. The network looks at pixels only; `keys` are not needed."""
        batch = self._preprocess([self._pixels(images, slot) for slot in range(len(images))])
        proposals, _ = self.model.proposal_generator(batch, self.model.backbone(batch.tensor), None)
        regions = from_proposals([found[: self.config.limit] for found in proposals])
        assert regions.scores is not None
        return regions[regions.scores >= self.config.min_score]

    def _preprocess(self, images: list[Tensor]) -> Any:
        """Returns detectron2's padded batch, normalized as the model wants it."""
        model = self.model
        if hasattr(model, "preprocess_image"):
            return model.preprocess_image([{"image": image} for image in images])
        # Its meta-architecture ProposalNetwork does this within `forward`.
        normalized = [(image - model.pixel_mean) / model.pixel_std for image in images]
        backbone = model.backbone
        return ImageList.from_tensors(
            normalized, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
        )

    def _pixels(self, images: ImageBatch, slot: int) -> Tensor:
        """Returns one image without padding as its file holds it: [3, h, w] in 0…255, float32."""
        height, width = images.sizes[slot].tolist()
        image = images.pixels[slot, :, :height, :width]
        mean, deviation = (255 * image.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        pixels = (image * deviation + mean).round().clamp(0, 255)
        return pixels.flip(0) if self.format == "BGR" else pixels


class StrictCheckpointer(DetectionCheckpointer):  # type: ignore[misc]
    """Remembers which of the model's weights a file did not have; detectron2 only logs them."""

    missing: tuple[str, ...] = ()

    def _load_model(self, checkpoint: Any) -> Any:
        found = super()._load_model(checkpoint)
        self.missing = (*found.missing_keys, *(shape[0] for shape in found.incorrect_shapes))
        return found


def load(
    config: str, weights: str, overrides: Sequence[str], parts: Sequence[str], device: str | torch.device
) -> tuple[Any, str]:
    """Builds a model and loads its weights.

    Args:
        config: a YAML file, a LazyConfig (.py), or the name of one in detectron2's model zoo.
        weights: a file or an address; empty: what the config names.
        overrides: for a YAML key, value, key, value …; for a LazyConfig key=value ….
        parts: prefixes of the weights that must be in the file.
        device: where the model goes.

    Returns:
        The model in evaluation mode, and the order of the channels that it wants ("RGB" or "BGR").

    Raises:
        InputError: no such config, weights that are missing or do not fit, a model without such parts.
    """
    path = _config_file(config)
    if path.endswith(".py"):
        cfg = LazyConfig.apply_overrides(LazyConfig.load(path), list(overrides))
        model, source = instantiate(cfg.model), weights or cfg.get("train", {}).get("init_checkpoint", "")
        channels = str(cfg.model.get("input_format", "BGR"))
    else:
        cfg = get_cfg()
        add_regionclip_config(cfg)
        cfg.merge_from_file(path)
        cfg.merge_from_list(list(overrides))
        cfg.MODEL.DEVICE = str(device)
        model, source, channels = build_model(cfg), weights or cfg.MODEL.WEIGHTS, str(cfg.INPUT.FORMAT)
    _load_weights(model, source, parts, config)
    return model.to(device).eval().requires_grad_(False), channels


def _config_file(config: str) -> str:
    if Path(config).is_file():
        return config
    try:
        return str(model_zoo.get_config_file(config))
    except RuntimeError:
        raise InputError(f"{config} is neither a file nor a config in detectron2's model zoo") from None


def _load_weights(model: nn.Module, source: str, parts: Sequence[str], config: str) -> None:
    held = set(model.state_dict())
    absent = [part for part in parts if not any(key.startswith(part) for key in held)]
    if absent:
        raise InputError(f"the model of {config} has no {absent[0]}; give one with a region proposal network")
    if not source:
        raise InputError(f"{config} names no weights; give them with weights=")
    checkpointer = StrictCheckpointer(model)
    try:
        checkpointer.load(source)
    except (AssertionError, OSError, RuntimeError) as error:
        raise InputError(f"weights {source} cannot be read: {str(error).splitlines()[0]}") from None
    missing = [key for key in checkpointer.missing if key.startswith(tuple(parts))]
    if missing:
        raise InputError(
            f"weights {source} lack {len(missing)} of the tensors of {config}'s proposal generator, first "
            f"{missing[0]}; do they belong to another model?"
        )
