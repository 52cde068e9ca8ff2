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
class SoftNames:
    """What the teacher says of each region besides its first concept.

    Attributes:
        ids: [n, K] int64, of this process's regions.
        probs: [n, K] probabilities; 0 for slots that hold no concept.
        image_index: [n] int64, which image each region is in.
        weights: [n], how much each region counts, of mean 1 over all processes; None: all alike.
        all_ids: [N, K] of all processes, as the next two.
        all_probs: [N, K].
        all_weights: [N]; None.
    """

    ids: Tensor
    probs: Tensor
    image_index: Tensor
    weights: Tensor | None
    all_ids: Tensor
    all_probs: Tensor
    all_weights: Tensor | None

    @classmethod
    def gathered(
        cls, ids: Tensor, probs: Tensor, image_index: Tensor, weights: Tensor | None, counts: list[int]
    ) -> SoftNames:
        """Collects what all processes hold, of which each has as many regions as `counts` says.

        Args:
            ids: see the class, as for the rest.
            probs: see the class.
            image_index: see the class.
            weights: of any mean.
            counts: regions of each process.
        """
        all_weights = None
        if weights is not None:
            all_weights = distributed.gather(weights.contiguous(), counts)
            mean = all_weights.mean().clamp(min=1e-6) if len(all_weights) else 1.0
            weights, all_weights = weights / mean, all_weights / mean
        everything = (
            distributed.gather(ids.contiguous(), counts),
            distributed.gather(probs.contiguous(), counts),
        )
        return cls(ids, probs, image_index, weights, *everything, all_weights)

    def names(self) -> Tensor:
        """Returns the concepts with a probability, of all processes: each once, ascending."""
        found: Tensor = torch.unique(self.all_ids[self.all_probs > 0])
        return found

    def targets(self, present: Tensor) -> Tensor:
        """Returns [n, P], this process's probabilities of the concepts in `present`, which holds them all."""
        return _spread(self.ids, self.probs, present)

    def all_targets(self, present: Tensor) -> Tensor:
        """Returns [N, P], the same of all processes."""
        return _spread(self.all_ids, self.all_probs, present)

    def of_same_image(self, present: Tensor) -> Tensor:
        """Returns [n, P] bool: which concepts a region's image has, by all of its regions."""
        images = int(self.image_index.max()) + 1 if len(self.image_index) else 0
        held = self.probs.new_zeros(images, len(present))
        held.index_add_(0, self.image_index, (self.targets(present) > 0).to(held.dtype))
        return held[self.image_index] > 0


def _spread(ids: Tensor, probs: Tensor, present: Tensor) -> Tensor:
    slots = torch.searchsorted(present, ids).clamp(max=len(present) - 1)
    held = torch.where(present[slots] == ids, probs, 0)  # slots without a probability may be of any concept
    return probs.new_zeros(len(ids), len(present)).scatter_add_(1, slots, held)


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
        soft: further concepts of the regions, for losses that ask for them; None.
    """

    regions: Tensor
    concepts: Tensor
    all_regions: Tensor
    all_concepts: Tensor
    old_regions: Tensor
    old_concepts: Tensor
    families: Tensor
    soft: SoftNames | None = None

    @classmethod
    def gathered(
        cls,
        regions: Tensor,
        concepts: Tensor,
        counts: list[int],
        memory: CrossBatchMemory,
        families: Tensor,
        soft: SoftNames | None = None,
    ) -> RegionTextBatch:
        """Collects the regions of all processes, of which each holds as many as `counts` says."""
        everything = distributed.gather(regions, counts), distributed.gather(concepts, counts)
        return cls(regions, concepts, *everything, *memory.held(), families, soft)

    @functools.cached_property
    def present(self) -> Tensor:
        """[P] int64, ascending: the concepts of all regions, those in the memory included."""
        further = [] if self.soft is None else [self.soft.names()]
        concepts: Tensor = torch.unique(torch.cat([self.all_concepts, self.old_concepts, *further]))
        return concepts

    def related(self, ones: Tensor, others: Tensor) -> Tensor:
        """Returns [a, b] bool: which of [a] and [b] concepts are of one family."""
        return self.families[ones][:, None] == self.families[others]

    def other_in_group(self, ones: Tensor, others: Tensor) -> Tensor:
        """Returns [a, b] bool: which of [a] and [b] concepts differ and are of one family."""
        return self.related(ones, others) & (ones[:, None] != others)


@dataclass
class SoftmaxConfig:
    """What the published loss leaves out: it takes a region's first concept alone, and all regions alike."""

    soft_labels: bool = option(
        False, "the teacher's probabilities of several concepts are the target, not the first concept alone"
    )
    hard_negatives: float = option(
        0.0,
        "how often the names of an image's other regions, such as others of its captions, count among a "
        "region's negatives, whether or not a sampled region has them; 0: as all names of the batch",
    )
    localization: bool = option(
        False,
        "weight regions by how well their phrase is localized: probability of the concept times objectness, "
        "of mean 1",
    )

    def __post_init__(self) -> None:
        if self.hard_negatives < 0:
            raise InputError(f"region_text.hard_negatives must be at least 0, found {self.hard_negatives}")


class SoftmaxRegionText(nn.Module):
    """The contrastive loss: regions against texts and texts against regions, cross entropy each.

    Attributes:
        needs_names: whether it reads `RegionTextBatch.soft`.
        needs_weights: whether it reads the regions' weights there.
    """

    def __init__(self, config: SoftmaxConfig) -> None:
        super().__init__()
        self.config = config
        self.needs_weights = config.localization
        self.needs_names = bool(config.soft_labels or config.hard_negatives or config.localization)

    def forward(self, named: RegionTextBatch, texts: Tensor, scale: Tensor) -> Tensor:
        """Returns this process's share of the loss, times the number of processes.

        Args:
            named: the regions.
            texts: [P, D], unit length, of `named.present`.
            scale: factor on the cosines.
        """
        logits = scale * named.regions @ texts.T  # [n, P]
        logits = logits.masked_fill(named.other_in_group(named.concepts, named.present), -torch.inf)
        to_text = self._to_text(named, logits) / max(len(named.all_regions), 1)
        spoken = torch.unique(named.all_concepts)  # those with a region that can be pulled
        to_region = self._to_region(named, texts, scale, local_shard(spoken)) / max(len(spoken), 1)
        return distributed.world() * (to_text + to_region) / 2

    def _to_text(self, named: RegionTextBatch, logits: Tensor) -> Tensor:
        """Returns the sum over regions, given logits [n, P] that are -inf where a concept is no negative."""
        slots, soft = torch.searchsorted(named.present, named.concepts), named.soft
        if soft is None or not self.needs_names:
            return F.cross_entropy(logits, slots, reduction="sum")
        target = F.one_hot(slots, logits.shape[1]).to(logits.dtype)
        if self.config.soft_labels:
            held = soft.targets(named.present).to(logits.dtype).masked_fill(logits.isneginf(), 0)
            mass = held.sum(1, keepdim=True)
            target = torch.where(mass > 0, held / mass.clamp(min=1e-6), target)
        if self.config.hard_negatives:
            beside = soft.of_same_image(named.present) & (target == 0)
            logits = torch.where(beside, logits + math.log(self.config.hard_negatives), logits)
        chosen = logits.log_softmax(1).masked_fill(target == 0, 0)
        losses = -(target * chosen).sum(1)
        return (losses if soft.weights is None else soft.weights * losses).sum()

    def _to_region(self, named: RegionTextBatch, texts: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
        """Returns the sum over `rows`, [p] concepts, whose regions share the positive mass evenly."""
        columns = torch.cat([named.all_regions, named.old_regions])  # [N + M, D]
        logits = scale * texts[torch.searchsorted(named.present, rows)] @ columns.T  # [p, N + M]
        positive = rows[:, None] == named.all_concepts  # [p, N]
        share = positive.to(logits.dtype) / positive.sum(1, keepdim=True)
        if named.soft is not None and self.config.soft_labels:
            held = named.soft.all_targets(named.present)[:, torch.searchsorted(named.present, rows)].T
            positive, share = held > 0, held.to(logits.dtype)
        if named.soft is not None and named.soft.all_weights is not None:
            share = share * named.soft.all_weights
        hidden = named.related(rows, torch.cat([named.all_concepts, named.old_concepts]))
        hidden[:, : positive.shape[1]] &= ~positive
        shares = logits.masked_fill(hidden, -torch.inf).log_softmax(1)[:, : positive.shape[1]]
        share = share / share.sum(1, keepdim=True).clamp(min=1e-6)
        return -(share * shares.masked_fill(~positive, 0)).sum()


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
