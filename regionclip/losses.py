"""Losses of region-text pretraining (arXiv 2112.09106, section 3.3)."""

# N regions, C concepts of the pool, K concepts kept a region, D embedding size
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(logits: Tensor, concept_ids: Tensor, concept_probs: Tensor) -> Tensor:
    """Cross entropy between the teacher's stored top-K and the student over the whole pool.

    It differs from the Kullback-Leibler divergence by the teacher's entropy, which no weight of the student
    moves.

    Args:
        logits: [N, C], the student's cosines over temperature.
        concept_ids: [N, K] int64.
        concept_probs: [N, K]; rows are normalised here, so that the kept mass counts as all of it.

    Returns:
        A scalar, the mean over the regions; zero without regions.
    """
    if not len(logits):
        return logits.sum()
    target = concept_probs / concept_probs.sum(1, keepdim=True).clamp(min=1e-6)  # [N, K]
    chosen = logits.log_softmax(1).gather(1, concept_ids)  # [N, K]
    return -(target * chosen).sum(1).mean()


def region_text_contrastive(
    regions: Tensor, texts: Tensor, concepts: Tensor, scale: Tensor | float, families: Tensor
) -> Tensor:
    """Contrasts regions with the batch's concepts; all regions of a concept are positives of its text.

    Args:
        regions: [N, D], unit length.
        texts: [C, D], unit length, the whole pool.
        concepts: [N] int64, each region's concept.
        scale: factor on the cosines.
        families: [C] int64: concepts of one family ("red umbrella", "umbrella") are no negatives of each
            other.

    Returns:
        A scalar: the mean of region-to-text and text-to-region cross entropy; zero without regions.
    """
    if not len(regions):
        return regions.sum()
    present, slot = torch.unique(concepts, return_inverse=True)  # [P]
    logits = scale * regions @ texts[present].T  # [N, P]
    kin = families[present][None, :] == families[concepts][:, None]  # [N, P]
    kin[torch.arange(len(slot), device=slot.device), slot] = False
    to_text = F.cross_entropy(logits.masked_fill(kin, -torch.inf), slot)
    # Of every text, its regions share the positive mass evenly.
    positive = F.one_hot(slot, len(present)).T.to(logits.dtype)  # [P, N]
    backward = logits.masked_fill(kin, -torch.inf).T.log_softmax(1).masked_fill(kin.T, 0)
    to_region = -(positive * backward).sum(1) / positive.sum(1)
    return (to_text + to_region.mean()) / 2
