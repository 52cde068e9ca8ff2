"""A frozen CLIP beside a detector, whose probabilities are combined with the detector's.

Training on base classes costs a detector some of what its student knew of others. The geometric mean of both
probabilities, with more weight of the frozen one for novel names, keeps it (ViLD, arXiv 2104.13921, section
3.4; F-VLM, arXiv 2209.15639, section 3.3).
"""

# B images, N regions of a batch, C names, D embedding size
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.data.batch import ImageBatch
from clip_base.jobs.config import option
from clip_base.models.clip import CLIP
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.vit import VisionTransformer
from clip_base.runtime.errors import InputError
from clip_base.weights.load import load_clip
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.region_heads import PerRegionHead, choose_head, is_recorded
from regionclip.structures.regions import Regions

OWN, NONE = "auto", "none"


@dataclass
class StudentConfig:
    """Which frozen CLIP is combined with a detector, and how much it counts. The exponents are F-VLM's."""

    weights: str = option(
        OWN,
        "CLIP whose probabilities are combined with the detector's, by a second pass of the tower: auto: the "
        "one in the detector's file, if training kept it there; none; or the file of the CLIP that the "
        "detector was trained from",
    )
    base: float = option(0.35, "exponent of its probability for base names, in [0, 1]")
    novel: float = option(0.65, "the same for names that the detector was not trained on")

    def __post_init__(self) -> None:
        if not self.weights:
            raise InputError(f"student.weights is empty; give {OWN}, {NONE} or a file")
        for name in ("base", "novel"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"student.{name} must be in [0, 1], found {getattr(self, name)}")

    @property
    def file(self) -> str:
        """The file that is named; "" for none."""
        return "" if self.weights in (OWN, NONE) else self.weights


class FrozenStudent(nn.Module):
    """Names regions with a frozen CLIP's vision tower and a detector's text embeddings.

    Args:
        visual: the vision tower; its text tower must be the detector's.
        scale: the factor on cosines.
        config: the exponents.
        region_head: how a ResNet embeds regions, one of `REGION_HEADS`.
    """

    def __init__(
        self,
        visual: ModifiedResNet | VisionTransformer,
        scale: float,
        config: StudentConfig | None = None,
        region_head: str = PerRegionHead.kind,
    ) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False).eval()
        self.scale, self.config = scale, config or StudentConfig()
        self.encoder = RegionEncoder.of_maps(self.visual, otherwise="crop", region_head=region_head)
        super().train(False)

    def with_config(self, config: StudentConfig) -> FrozenStudent:
        """Returns the same tower with other exponents."""
        return FrozenStudent(self.visual, self.scale, config, self.encoder.region_head)

    def train(self, mode: bool = True) -> FrozenStudent:
        """Does nothing: it is frozen."""
        return self

    @torch.no_grad()
    def combine(
        self, probabilities: Tensor, images: ImageBatch, regions: Regions, names: Tensor, novel: Tensor
    ) -> Tensor:
        """Returns [N, C]: the detector's probabilities^(1 − e) times the frozen CLIP's^e, e by name.

        Args:
            probabilities: [N, C], the detector's.
            images: B images.
            regions: N regions.
            names: [C + M, D], unit length: embeddings of the names, then of what competes with them.
            novel: [C] bool.
        """
        known = self.probabilities(images, regions, names)[:, : probabilities.shape[1]]
        with torch.autocast(known.device.type, enabled=False):
            return geometric_mean(probabilities, known, self.exponents(novel))

    def probabilities(self, images: ImageBatch, regions: Regions, names: Tensor) -> Tensor:
        """Returns [N, C + M], its probabilities of names ([C + M, D], unit length) at N regions of images."""
        if self.encoder.pools_maps:
            embeddings, _ = self.encoder.roi_heads(self.encoder.feature_maps(images), regions)
        else:
            embeddings = self.encoder(images, regions)
        with torch.autocast(embeddings.device.type, enabled=False):
            cosines = F.normalize(embeddings.float(), dim=-1) @ names.T
            return (self.scale * cosines).softmax(1)

    def exponents(self, novel: Tensor) -> Tensor:
        """Returns [C], how much its probability of each name counts, given which are novel: [C] bool."""
        return torch.where(novel, self.config.novel, self.config.base)


def geometric_mean(probabilities: Tensor, known: Tensor, exponents: Tensor) -> Tensor:
    """Returns [N, C]: probabilities^(1 − e) · known^e, with the exponents e, [C], of the second ones."""
    return probabilities ** (1 - exponents) * known**exponents


def load_student(config: StudentConfig, detector: CLIP, region_head: str) -> FrozenStudent:
    """Returns the frozen CLIP of a file, to be combined with a detector.

    Args:
        config: a file and the exponents.
        detector: the detector's CLIP, whose text tower embeds the names for both.
        region_head: the detector's, which the frozen CLIP is given too if its file does not say its own.

    Raises:
        InputError: the file is missing, damaged or no CLIP, or its text tower is another.
    """
    clip = load_clip(config.file)
    own, other = (
        {name: value for name, value in model.state_dict().items() if name.startswith("text.")}
        for model in (clip, detector)
    )
    if own.keys() != other.keys() or not all(torch.equal(own[name].cpu(), other[name].cpu()) for name in own):
        raise InputError(
            f"student.weights={config.weights} has another text tower than the detector, so that their "
            "probabilities are not of the same names; give the CLIP that the detector was trained from"
        )
    scale = float(clip.logit_scale.detach().exp())
    own_head = choose_head("auto", config.file)
    if own_head == PerRegionHead.kind and clip.map_tower is not None and not is_recorded(config.file):
        own_head = region_head
    return FrozenStudent(clip.visual, scale, config, own_head)
