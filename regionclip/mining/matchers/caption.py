"""The matcher `caption`: the image's own captions as a prior, with a slot for unmatched regions."""

# n regions of one image, C concepts of the vocabulary, P concepts that the image's own captions name
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_base.jobs.config import option
from regionclip.concepts.synonyms import concept_groups
from regionclip.mining.matchers.base import MatcherOptions, Matches, MatchInputs, top_k


@dataclass(kw_only=True)
class CaptionPrior(MatcherOptions):
    """How far an image's captions are believed."""

    caption_prior: float = option(
        0.9,
        "prior probability that a region shows something mentioned in the image's captions",
        renamed_from="trust",
    )


@dataclass
class CaptionConfig(CaptionPrior):
    """Options of the caption matcher."""

    min_probability: float = option(
        0.5, "regions whose best concept from the captions is less probable stay unmatched"
    )
    min_phrase: float = option(
        0.2, "the best region of a phrase is kept if it is at least this probable; 1: never"
    )
    min_similarity: float = option(
        -1.0, "regions whose cosine with their best concept is lower stay unmatched; -1: no minimum"
    )
    min_objectness: float = option(0.0, "regions with lower objectness, in [0, 1], are dropped")


class CaptionMatcher:
    """Bayes' rule with the captions as prior.

    A region shows one of the P own concepts with prior `caption_prior`, evenly spread, or any other
    concept of the pool with prior 1 - caption_prior; the likelihood is exp(cosine / temperature). What falls
    to the others is the unmatched slot. Concepts of an own concept's family ("red umbrella" of "umbrella")
    are neither own nor others.
    """

    def __init__(self, config: CaptionConfig, names: Sequence[str]) -> None:
        self.config = config
        self.family = concept_groups(names)

    def __call__(self, inputs: MatchInputs) -> Matches:
        """For every region its best phrase, for every phrase its best region; both above their thresholds."""
        own, config = inputs.caption_concepts, self.config
        if not len(own) or not len(inputs.objectness):
            return nothing(config.k, inputs.similarity)
        probabilities = self.posterior(inputs)  # [n, P]
        eligible = inputs.objectness >= config.min_objectness
        eligible &= inputs.similarity[:, own].amax(1) >= config.min_similarity
        sure = probabilities.amax(1) >= config.min_probability
        best = probabilities.masked_fill(~eligible[:, None], -1).max(0)  # of every phrase
        sure[best.indices[best.values >= config.min_phrase]] = True
        kept = torch.nonzero(sure & eligible).flatten()
        match = top_k(probabilities, kept, config.k, torch.arange(len(own)))
        return Matches(kept, own[match.concept_ids], match.concept_probs, match.from_caption)

    def posterior(self, inputs: MatchInputs) -> Tensor:
        """Returns [n, P] probabilities of the own concepts; 1 minus a row's sum is the unmatched slot."""
        own, logits = inputs.caption_concepts, inputs.similarity.float() / inputs.temperature  # [n, C]
        related = torch.isin(self.family, self.family[own])
        others = logits.masked_fill(related, -math.inf)
        num_others = max(int((~related).sum()), 1)
        mine = logits[:, own] + math.log(self.config.caption_prior / len(own))  # [n, P]
        rest = others.logsumexp(1, keepdim=True) + math.log(
            (1 - self.config.caption_prior) / num_others
        )  # [n, 1]
        return torch.cat([mine, rest], 1).softmax(1)[:, :-1]


def nothing(k: int, like: Tensor) -> Matches:
    """Returns a Match that keeps no region."""
    ids = torch.zeros(0, k, dtype=torch.int64)
    return Matches(ids[:, 0], ids, like.new_zeros(0, k), torch.zeros(0, dtype=torch.bool))
