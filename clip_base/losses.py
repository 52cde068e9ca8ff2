"""Losses over unit-length embeddings."""

# B pairs, D embedding size
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor | None = None) -> Tensor:
    """The symmetric cross entropy of CLIP (arXiv 2103.00020, section 2.3).

    Args:
        images: [B, D], unit length.
        texts: [B, D], unit length; row i belongs to image i.
        scale: the factor on the cosines, exp(logit scale).
        same: [B, B] bool, where text j says the same as text i; the target of a row is then spread evenly
            over its equal texts, so that no text counts as the negative of itself. None: every text is unlike
            all others.

    Returns:
        A scalar: the mean of the image-to-text and the text-to-image cross entropy.
    """
    logits = scale * images @ texts.T  # [B, B]
    if same is None:
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    spread = same.to(logits.dtype)
    spread = spread / spread.sum(1, keepdim=True)  # still symmetric: a group's rows have one sum
    return (F.cross_entropy(logits, spread) + F.cross_entropy(logits.T, spread)) / 2


def equal_rows(tokens: Tensor) -> Tensor:
    """Returns [B, B] bool: whether captions i and j are the same tokens. `tokens` is [B, T]."""
    _, group = torch.unique(tokens, dim=0, return_inverse=True)
    same: Tensor = group[:, None] == group[None, :]
    return same
