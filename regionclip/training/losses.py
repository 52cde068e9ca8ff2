"""Losses of region pretraining (arXiv 2112.09106, section 3.3; arXiv 2310.01403), summed over rows.

In a run of several processes each computes the rows of its own regions and of its share of the concepts, as
`clip_base.objectives` does; what the rows are contrasted with comes from all processes.
"""

# n regions of this process, N of all processes, M in the memory, P concepts among them, C of the pool,
# K kept a region, D embedding size
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError

REGION_TEXT = "regionclip.region_text"


def distillation(logits: Tensor, concept_ids: Tensor, concept_probs: Tensor) -> Tensor:
    """Returns the Kullback-Leibler divergence from the teacher's top K to the student over the whole pool.

    Args:
        logits: [n, C], the student's cosines over temperature.
        concept_ids: [n, K] int64.
        concept_probs: [n, K]; rows are normalized here, so that the kept mass counts as all of it.
    """
    target = concept_probs / concept_probs.sum(1, keepdim=True).clamp(min=1e-6)  # [n, K]
    chosen = logits.log_softmax(1).gather(1, concept_ids)  # [n, K]
    # The rest of the sum is the teacher's entropy, which no weight of the student moves.
    return (target.xlogy(target) - target * chosen).sum()


def cosine_distance(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Returns the sum over rows of 1 - cosine; both are [n, D], unit length."""
    return (1 - (embeddings * targets).sum(1)).sum()


class CrossBatchMemory(nn.Module):
    """The regions of the last steps, as further negatives (cross-batch memory, arXiv 1912.06798).

    It is part of a task's state, so that a resumed run continues with it.

    Args:
        size: M, how many regions are kept; 0 keeps none.
        width: D.
    """

    regions: Tensor
    concepts: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("regions", torch.zeros(size, width))
        self.register_buffer("concepts", torch.full((size,), -1))

    def held(self) -> tuple[Tensor, Tensor]:
        """Returns copies of what was pushed last: [m, D] embeddings and [m] concepts, m at most M."""
        held = self.concepts >= 0
        return self.regions[held], self.concepts[held]

    @torch.no_grad()
    def push(self, regions: Tensor, concepts: Tensor) -> None:
        """Adds [N, D] regions and their [N] concepts; the oldest fall out."""
        size = len(self.concepts)
        self.regions.copy_(torch.cat([regions.to(self.regions.dtype), self.regions])[:size])
        self.concepts.copy_(torch.cat([concepts, self.concepts])[:size])


@dataclass(frozen=True)
class RegionTextBatch:
    """The regions of a batch and the concepts that they are contrasted with.

    Attributes:
        regions: [n, D] of this process, unit length.
        concepts: [n] int64, each one's concept.
        all_regions: [N, D] of all processes; gradients flow back to where they came from.
        all_concepts: [N] int64.
        old_regions: [M, D] from the memory.
        old_concepts: [M] int64.
        families: [C] int64; concepts of one family ("red umbrella", "umbrella") are no negatives of each
            other.
    """

    regions: Tensor
    concepts: Tensor
    all_regions: Tensor
    all_concepts: Tensor
    old_regions: Tensor
    old_concepts: Tensor
    families: Tensor

    @classmethod
    def gathered(
        cls, regions: Tensor, concepts: Tensor, counts: list[int], memory: CrossBatchMemory, families: Tensor
    ) -> RegionTextBatch:
        """Collects the regions of all processes, of which each holds as many as `counts` says."""
        everything = distributed.gather(regions, counts), distributed.gather(concepts, counts)
        return cls(regions, concepts, *everything, *memory.held(), families)

    @functools.cached_property
    def present(self) -> Tensor:
        """[P] int64, ascending: the concepts of all regions, those in the memory included."""
        concepts: Tensor = torch.unique(torch.cat([self.all_concepts, self.old_concepts]))
        return concepts

    def related(self, ones: Tensor, others: Tensor) -> Tensor:
        """Returns [a, b] bool: which of [a] and [b] concepts are of one family."""
        return self.families[ones][:, None] == self.families[others]

    def other_in_group(self, ones: Tensor, others: Tensor) -> Tensor:
        """Returns [a, b] bool: which of [a] and [b] concepts differ and are of one family."""
        return self.related(ones, others) & (ones[:, None] != others)


@dataclass
class SoftmaxConfig:
    """The softmax variant has no options."""


class SoftmaxRegionText(nn.Module):
    """The published contrastive loss: regions against texts and texts against regions, cross entropy each."""

    def __init__(self, config: SoftmaxConfig) -> None:
        super().__init__()

    def forward(self, named: RegionTextBatch, texts: Tensor, scale: Tensor) -> Tensor:
        """Returns this process's share of the loss, times the number of processes.

        Args:
            named: the regions.
            texts: [P, D], unit length, of `named.present`.
            scale: factor on the cosines.
        """
        logits = scale * named.regions @ texts.T  # [n, P]
        logits = logits.masked_fill(named.other_in_group(named.concepts, named.present), -torch.inf)
        slots = torch.searchsorted(named.present, named.concepts)
        to_text = F.cross_entropy(logits, slots, reduction="sum") / max(len(named.all_regions), 1)
        spoken = torch.unique(named.all_concepts)  # those with a region that can be pulled
        to_region = self._to_region(named, texts, scale, local_shard(spoken)) / max(len(spoken), 1)
        return distributed.world() * (to_text + to_region) / 2

    def _to_region(self, named: RegionTextBatch, texts: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
        """Returns the sum over `rows`, [p] concepts, whose regions share the positive mass evenly."""
        columns = torch.cat([named.all_regions, named.old_regions])  # [N + M, D]
        logits = scale * texts[torch.searchsorted(named.present, rows)] @ columns.T  # [p, N + M]
        positive = rows[:, None] == named.all_concepts  # [p, N]
        hidden = named.related(rows, torch.cat([named.all_concepts, named.old_concepts]))
        hidden[:, : positive.shape[1]] &= ~positive
        shares = logits.masked_fill(hidden, -torch.inf).log_softmax(1)[:, : positive.shape[1]]
        return -(shares.masked_fill(~positive, 0).sum(1) / positive.sum(1)).sum()


@dataclass
class SigmoidConfig:
    """Initial values (arXiv 2303.15343, section 3.2)."""

    scale: float = option(10.0, "initial value of the learned factor on the cosines")
    bias: float = option(-10.0, "initial value of the learned bias; negative, as most pairs do not match")

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise InputError(f"region_text.scale must be above 0, found {self.scale}")


class SigmoidRegionText(nn.Module):
    """SigLIP's loss: every pair of a region and a concept is a decision by itself (arXiv 2303.15343, 3.2).

    The memory adds its concepts; its regions have no gradient, and pairs of their own would teach nothing.

    Attributes:
        log_scale: scalar, learned, logarithm of the factor on the cosines.
        bias: scalar, learned, added to the scaled cosines.
    """

    def __init__(self, config: SigmoidConfig) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        self.bias = nn.Parameter(torch.tensor(config.bias))

    def forward(self, named: RegionTextBatch, texts: Tensor, scale: Tensor) -> Tensor:
        """Returns this process's share of the loss, times the number of processes; `scale` is its own.

        Args:
            named: the regions.
            texts: [P, D], unit length, of `named.present`.
            scale: not used: pairs decided one by one need a scale and a bias that fit each other.
        """
        logits = self.log_scale.exp() * named.regions @ texts.T + self.bias  # [n, P]
        same = named.concepts[:, None] == named.present
        pairs = -F.logsigmoid(torch.where(same, logits, -logits))
        pairs = pairs.masked_fill(named.other_in_group(named.concepts, named.present), 0)
        return distributed.world() * pairs.sum() / max(len(named.all_regions), 1)


def local_shard(rows: Tensor) -> Tensor:
    """Returns this process's share of rows that all processes hold alike."""
    return rows.tensor_split(distributed.world())[distributed.rank()]
