"""What a matcher is. Anything that keeps this contract can be declared in the group `regionclip.matchers`."""

# n regions of one image, C concepts of the vocabulary, P concepts that the image's own captions name, K kept
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

GROUP = "regionclip.matchers"


@dataclass(frozen=True)
class Evidence:
    """What is known of one image's regions.

    Attributes:
        similarity: [n, C] cosines between the teacher's region embeddings and the vocabulary.
        objectness: [n] in [0, 1].
        own: [P] int64, the vocabulary's rows that the image's captions name, each once.
        temperature: what the cosines are divided by before a softmax.
    """

    similarity: Tensor
    objectness: Tensor
    own: Tensor
    temperature: float


@dataclass(frozen=True)
class Match:
    """The regions that were kept.

    Attributes:
        kept: [m] int64, rows of the evidence.
        concept_ids: [m, K] int64, most probable first.
        concept_probs: [m, K] probabilities; a row sums to at most 1, the rest is what was cut off or is
            unmatched.
        from_caption: [m] bool, whether the first concept is one that the image's own captions name.
    """

    kept: Tensor
    concept_ids: Tensor
    concept_probs: Tensor
    from_caption: Tensor


class Matcher(Protocol):
    """Matches one image's regions with concepts.

    A matcher is a class whose constructor takes `config`, a dataclass with its options, and `names`, the
    vocabulary's names in the order of its rows.
    """

    def __call__(self, evidence: Evidence) -> Match:
        """Returns the regions to keep with their concepts; none when nothing matches."""
        ...


def top_k(probabilities: Tensor, kept: Tensor, k: int, own: Tensor) -> Match:
    """Makes a Match of [n, C] probabilities: the k largest of every kept row."""
    probs, ids = probabilities[kept].topk(min(k, probabilities.shape[1]), dim=1)
    return Match(kept, ids, probs, torch.isin(ids[:, 0], own))


def families(names: Sequence[str]) -> Tensor:
    """Returns [C] int64: the row of the most general name that a name ends with, or its own.

    "small red umbrella" and "red umbrella" belong to the family of "umbrella" when the vocabulary holds it:
    the one is no counterexample of the other.
    """
    rows = {name: row for row, name in enumerate(names)}
    roots = []
    for name in names:
        words = name.split(" ")
        suffixes = (" ".join(words[start:]) for start in range(len(words) - 1, -1, -1))
        roots.append(next(rows[suffix] for suffix in suffixes if suffix in rows))
    return torch.tensor(roots, dtype=torch.int64)
