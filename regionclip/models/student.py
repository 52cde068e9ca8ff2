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

from clip_base.jobs.config import option
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.weights.load import load_clip
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.region_heads import PerRegionHead, choose_head
from regionclip.structures.regions import FeatureMaps, Regions


@dataclass
class StudentConfig:
    """Which frozen CLIP is combined with a detector, and how much it counts. The exponents are F-VLM's."""

    weights: str = option(
        "",
        "CLIP that the detector was trained from, as `regionclip pretrain` wrote it: its probabilities "
        "are combined with the detector's; takes a second pass of the tower. Empty: none",
    )
    base: float = option(
        0.35, "exponent of its probability for base names, and where none is novel, in [0, 1]"
    )
    novel: float = option(0.65, "the same for novel names")

    def __post_init__(self) -> None:
        for name in ("base", "novel"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"student.{name} must be in [0, 1], found {getattr(self, name)}")


class FrozenStudent(nn.Module):
    """Names regions with a frozen CLIP's vision tower and a detector's text embeddings.

    Args:
        clip: its vision tower is kept; its text tower must be the detector's.
        config: the exponents.
        region_head: how its ResNet embeds regions, one of `REGION_HEADS`.
    """

    def __init__(self, clip: CLIP, config: StudentConfig, region_head: str = PerRegionHead.kind) -> None:
        super().__init__()
        self.visual = clip.visual.requires_grad_(False).eval()
        self.scale = float(clip.logit_scale.detach().exp())
        self.config = config
        self.encoder = RegionEncoder.of_maps(self.visual, otherwise="crop", region_head=region_head)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenStudent:
        """Does nothing: it is frozen."""
        return self

    @torch.no_grad()
    def combine(
        self, probabilities: Tensor, maps: FeatureMaps, regions: Regions, names: Tensor, novel: Tensor
    ) -> Tensor:
        """Returns [N, C]: the detector's probabilities^(1 − e) times the frozen CLIP's^e, e by name.

        Args:
            probabilities: [N, C], the detector's.
            maps: holds the images; the detector's maps are not read.
            regions: N regions.
            names: [C + M, D], unit length: embeddings of the names, then of negatives.
            novel: [C] bool.
        """
        embeddings = self.encoder(maps.images, regions)
        with torch.autocast(embeddings.device.type, enabled=False):
            cosines = F.normalize(embeddings.float(), dim=-1) @ names.T
            known = (self.scale * cosines).softmax(1)[:, : probabilities.shape[1]]
            exponents = torch.where(novel, self.config.novel, self.config.base)  # [C]
            return probabilities ** (1 - exponents) * known**exponents


def load_student(config: StudentConfig, detector: CLIP) -> FrozenStudent:
    """Returns the frozen CLIP of a file, to be combined with a detector.

    Args:
        config: the file and the exponents.
        detector: the detector's CLIP, whose text tower embeds the names for both.

    Raises:
        InputError: the file is missing, damaged or no CLIP, or its text tower is another.
    """
    clip = load_clip(config.weights)
    own, other = (
        {name: value for name, value in model.state_dict().items() if name.startswith("text.")}
        for model in (clip, detector)
    )
    if own.keys() != other.keys() or not all(torch.equal(own[name].cpu(), other[name].cpu()) for name in own):
        raise InputError(
            f"student.weights={config.weights} has another text tower than the detector, so that their "
            "probabilities are not of the same names; give the CLIP that the detector was trained from"
        )
    return FrozenStudent(clip, config, choose_head("auto", config.weights))
