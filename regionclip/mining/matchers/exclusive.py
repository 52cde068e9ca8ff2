"""The matcher `exclusive`: the best region of every phrase, and further ones with high scores."""

# n regions of one image, P concepts that the image's own captions name
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from regionclip.mining.matchers.base import Matches, MatchInputs, top_k
from regionclip.mining.matchers.caption import CaptionConfig, CaptionMatcher, CaptionPrior, nothing
from regionclip.structures.boxes import area, intersection


@dataclass
class ExclusiveConfig(CaptionPrior):
    """Options of the exclusive matcher. Score: the probability of a concept times the objectness."""

    min_first: float = option(0.1, "the best region of a concept is kept if its score is at least this")
    min_score: float = option(0.5, "further regions of a concept are kept if their score is at least this")
    overlap: float = option(
        0.3, "intersection over the smaller area above which the worse of two regions of a concept is dropped"
    )

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        if not 0 <= self.overlap <= 1:
            raise InputError(f"matcher.overlap must be in 0…1, found {self.overlap}")


class ExclusiveMatcher:
    """The caption matcher's posterior, weighed with objectness, and suppression within each concept.

    Most mined regions that show no object lie half beside one, next to a region that fits it better. Within a
    concept the better one suppresses the others, measured by the share of the smaller box, so that a part of
    an object does not stand beside the whole. What is left may be unsure as long as it is the only inputs
    for its phrase, since the caption says that the thing is there.
    """

    def __init__(self, config: ExclusiveConfig, names: Sequence[str]) -> None:
        self.config = config
        self.caption = CaptionMatcher(CaptionConfig(caption_prior=config.caption_prior, k=config.k), names)

    def __call__(self, inputs: MatchInputs) -> Matches:
        """Returns the regions kept, in their order."""
        own, config = inputs.caption_concepts, self.config
        if not len(own) or not len(inputs.objectness):
            return nothing(config.k, inputs.similarity)
        probabilities = self.caption.posterior(inputs)  # [n, P]
        best = probabilities.max(1)
        scores = best.values * inputs.objectness  # [n]
        kept = self._pick(inputs.boxes, scores, best.indices)
        match = top_k(probabilities, kept, config.k, torch.arange(len(own)))
        return Matches(kept, own[match.concept_ids], match.concept_probs, match.from_caption)

    def _pick(self, boxes: Tensor, scores: Tensor, concepts: Tensor) -> Tensor:
        """Returns the places that are kept, of boxes [n, 4] with scores [n] and concepts [n], in order."""
        smaller = torch.minimum(area(boxes)[:, None], area(boxes)[None]).clamp(min=1e-6)
        shared = intersection(boxes, boxes) / smaller  # [n, n]
        rivals = (concepts[:, None] == concepts[None]) & (shared > self.config.overlap)
        open_, seen, kept = torch.ones_like(scores, dtype=torch.bool), set[int](), []
        for place in scores.argsort(descending=True, stable=True).tolist():
            concept = int(concepts[place])
            least = self.config.min_score if concept in seen else self.config.min_first
            if open_[place] and float(scores[place]) >= least:
                kept.append(place)
                open_ &= ~rivals[place]
                seen.add(concept)
        return torch.tensor(sorted(kept), dtype=torch.int64)
