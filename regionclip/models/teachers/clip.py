"""Teachers of this package: every CLIP that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_base.models.tokenizer import Tokenizer
from clip_base.models.vit import VisionTransformer
from clip_base.weights.load import load_clip
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.teachers.base import RegionEmbedder, RegionView, Score, TeacherModel
from regionclip.models.teachers.mixed import MODE as MIXED
from regionclip.models.teachers.mixed import MixedRegions


@dataclass
class ClipConfig:
    """A CLIP of this package has no options of its own: its file says everything."""


class ClipTeacher(TeacherModel):
    """A CLIP in any format that this package reads; a ResNet pools regions of its map, too.

    Args:
        config: none.
        weights: file, folder or published name.
    """

    def __init__(self, config: ClipConfig, weights: str) -> None:
        super().__init__()
        self.clip = load_clip(weights)
        self.resolution = self.clip.visual.resolution
        self.stride = self.clip.visual.stride if isinstance(self.clip.visual, VisionTransformer) else 0
        self.score = Score(float(torch.exp(self.clip.logit_scale.detach())))
        self.tokenizer = Tokenizer(self.clip.config.text.context_length)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the CLIP's weights by their own names, whose hash tells models apart."""
        return self.clip.state_dict(*args, **kwargs)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """See `TeacherModel`."""
        return self.clip.encode_image(pixels)

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """See `TeacherModel`."""
        assert isinstance(self.clip.visual, VisionTransformer)
        return self.clip.visual.dense(pixels)

    def tokenize(self, texts: list[str], truncate: bool = False) -> Tensor:
        """See `TeacherModel`."""
        return self.tokenizer(texts, truncate)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """See `TeacherModel`."""
        return self.clip.encode_text(tokens)

    def region_embedder(self, view: RegionView) -> RegionEmbedder:
        """Returns the region encoder that students have too, or what chooses between two of them."""
        if view.mode == MIXED:
            return MixedRegions(self.clip.visual, view)
        return RegionEncoder(
            self.clip.visual, view.mode, view.context, scale=view.scale, region_head=view.region_head
        )
