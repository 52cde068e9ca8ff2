"""Losses over unit-length embeddings."""

# B pairs, D embedding size
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The symmetric cross entropy of CLIP (arXiv 2103.00020, section 2.3).

    Texts that say the same need no care: they have one embedding, so that a target spread evenly over them
    would give the same value and the same gradients.

    Args:
        images: [B, D], unit length.
        texts: [B, D], unit length; row i belongs to image i.
        scale: the factor on the cosines, exp(logit scale).

    Returns:
        A scalar: the mean of the image-to-text and the text-to-image cross entropy.
    """
    logits = scale * images @ texts.T  # [B, B]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
