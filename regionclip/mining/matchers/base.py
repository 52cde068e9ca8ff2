"""The protocol of matchers, which plugins declare in the group `regionclip.matchers`."""

# n regions of one image, C concepts of the vocabulary, P concepts that the image's own captions name, K kept
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clip_base.jobs.config import option
from clip_base.runtime.errors import InputError
from regionclip.models.teachers.base import probabilities_of

GROUP = "regionclip.matchers"


@dataclass(frozen=True)
class MatchInputs:
    """What is known of one image's regions.

    Attributes:
        similarity: [n, C] cosines between the teacher's region embeddings and the vocabulary.
        objectness: [n] in [0, 1].
        caption_concepts: [P] int64, the vocabulary's rows that the image's captions name, each once.
        temperature: what the cosines are divided by before a softmax.
        boxes: [n, 4] (x1, y1, x2, y2) in pixels.
        bias: of a teacher that decides about each name by itself, see `probabilities`; None: a softmax.
    """

    similarity: Tensor
    objectness: Tensor
    caption_concepts: Tensor
    temperature: float
    boxes: Tensor
    bias: float | None = None

    def probabilities(self) -> Tensor:
        """Returns [N, C] probabilities of N regions, as the teacher was trained to give them.

        Rows sum to 1, of a teacher with a bias to at most 1: the rest is what matches no concept. Among
        concepts that compete the bias, which is the same for all, has no say.
        """
        return probabilities_of(self.similarity, self.temperature, self.bias)


@dataclass(frozen=True)
class Matches:
    """The regions that were kept.

    Attributes:
        indices: [M] int64, rows of the inputs.
        concept_ids: [M, K] int64, most probable first.
        concept_probs: [M, K] probabilities; a row sums to at most 1, the rest is what was cut off or is
            unmatched.
        from_caption: [M] bool, whether the first concept is one that the image's own captions name.
    """

    indices: Tensor
    concept_ids: Tensor
    concept_probs: Tensor
    from_caption: Tensor


@dataclass(kw_only=True)
class MatcherOptions:
    """How many concepts a matcher stores. Those of a config that inherits from it are checked, too."""

    k: int = option(5, "concepts stored per region, the most probable ones")

    def __post_init__(self) -> None:
        """Checks thresholds (options called min_…), priors and counts."""
        for name, value in vars(self).items():
            least = -1 if name == "min_similarity" else 0
            if name.startswith("min_") and not least <= value <= 1:
                raise InputError(f"matcher.{name} must be in {least}…1, found {value}")
            if name.endswith("_prior") and not 0 < value < 1:
                raise InputError(f"matcher.{name} must be between 0 and 1, found {value}")
        if self.k < 1:
            raise InputError(f"matcher.k must be at least 1 concept per region, found {self.k}")


class Matcher(Protocol):
    """Matches one image's regions with concepts.

    A matcher is a class whose constructor takes `config`, a dataclass with its options, and `names`, the
    vocabulary's names in the order of its rows.
    """

    def __call__(self, inputs: MatchInputs) -> Matches:
        """Returns the regions to keep with their concepts; none when nothing matches."""
        ...


def top_k(probabilities: Tensor, indices: Tensor, k: int, caption_concepts: Tensor) -> Matches:
    """Makes `Matches` of [n, C] probabilities: the k largest of every kept row."""
    probs, ids = probabilities[indices].topk(min(k, probabilities.shape[1]), dim=1)
    return Matches(indices, ids, probs, torch.isin(ids[:, 0], caption_concepts))
