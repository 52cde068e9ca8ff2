"""The matcher `pool`, as published: every region is compared with the whole pool of concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clip_base.jobs.config import option
from regionclip.mining.matchers.base import MatcherOptions, Matches, MatchInputs, top_k


@dataclass
class PoolConfig(MatcherOptions):
    """Options of the pool matcher; the defaults are the released code's (arXiv 2112.09106)."""

    min_probability: float = option(
        0.1, "regions whose best concept in the pool is less probable are dropped"
    )
    min_objectness: float = option(0.0, "regions with lower objectness, in [0, 1], are dropped")
    keep_all_if_none: bool = option(True, "keep all regions of an image if none reaches min_probability")


class PoolMatcher:
    """The teacher's probabilities of all concepts, CLIP's by a softmax; captions are not looked at."""

    def __init__(self, config: PoolConfig, names: Sequence[str]) -> None:
        self.config = config

    def __call__(self, inputs: MatchInputs) -> Matches:
        """Returns the regions whose best concept is probable enough."""
        probabilities = inputs.probabilities()  # [n, C]
        object_like = inputs.objectness >= self.config.min_objectness
        sure = object_like & (probabilities.amax(1) >= self.config.min_probability)
        if self.config.keep_all_if_none and not bool(sure.any()):
            sure = object_like
        return top_k(probabilities, torch.nonzero(sure).flatten(), self.config.k, inputs.caption_concepts)
