"""Losses over unit-length embeddings."""

# B pairs, D embedding size
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError


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


@dataclass(frozen=True)
class PairEmbeddings:
    """The embeddings of a batch: this process's pairs, and those of all processes.

    Attributes:
        images: [b, D], unit length.
        texts: [b, D], unit length; row i belongs to image i.
        all_images: [B, D]; gradients flow back to the processes that they came from.
        all_texts: [B, D].
        first: this process's first row among all.
        groups: [B] int64, equal where two texts say the same; None where the objective need not know.
    """

    images: Tensor
    texts: Tensor
    all_images: Tensor
    all_texts: Tensor
    first: int = 0
    groups: Tensor | None = None

    @classmethod
    def gathered(cls, images: Tensor, texts: Tensor, tokens: Tensor | None) -> PairEmbeddings:
        """Collects the pairs of all processes.

        Args:
            images: [b, D] of this process, unit length.
            texts: [b, D] of this process, unit length.
            tokens: [b, T] token ids; equal rows are texts that say the same. None: it does not matter.
        """
        first, groups = distributed.rank() * len(images), None
        if tokens is not None:
            _, groups = torch.unique(distributed.gather(tokens), dim=0, return_inverse=True)
        return cls(images, texts, distributed.gather(images), distributed.gather(texts), first, groups)

    @property
    def alone(self) -> bool:
        """Whether this process holds all pairs."""
        return len(self.images) == len(self.all_images)


@dataclass
class ContrastiveConfig:
    """The contrastive loss has no options."""


class Contrastive(nn.Module):
    """CLIP's symmetric cross entropy, all similarities at once.

    Attributes:
        name: what the loss is called in the log.
        initial_logit_scale: what training from random weights begins with; None: CLIP's.
        merge_equal: whether the loss must know which texts say the same; see `contrastive`.
    """

    name = "contrastive"
    initial_logit_scale: float | None = None
    merge_equal = False

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()

    def forward(self, pairs: PairEmbeddings, scale: Tensor) -> Tensor:
        """Returns the scalar loss of this process's rows; `scale` is the factor on the cosines."""
        if pairs.alone:
            # One matrix of similarities then serves both directions.
            return contrastive(pairs.images, pairs.texts, scale)
        by_image = row_entropy(pairs.first, pairs.images, pairs.all_texts, scale)
        by_text = row_entropy(pairs.first, pairs.texts, pairs.all_images, scale)
        return (by_image + by_text) / (2 * len(pairs.images))


def row_entropy(first: int, rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Returns the cross entropy of rows to their matching columns, summed over the rows.

    Args:
        first: the place among the columns of what matches row 0.
        rows: [n, D], unit length.
        columns: [B, D], unit length.
        scale: the factor on the cosines.
    """
    logits = scale * rows @ columns.T  # [n, B]
    target = torch.arange(first, first + len(rows), device=rows.device)
    return F.cross_entropy(logits, target, reduction="sum")


@dataclass
class ChunkedConfig:
    """How much of the similarity matrix exists at a time."""

    rows: int = option(1024, "rows of the similarity matrix computed at a time")

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise InputError(f"objective.rows must be at least 1, found {self.rows}")


class Chunked(Contrastive):
    """CLIP's symmetric cross entropy, a few rows of similarities at a time: equal gradients, little memory.

    Each chunk's gradient is taken as soon as its loss is known, so that neither similarities nor
    probabilities are kept for the backward pass.
    """

    def __init__(self, config: ChunkedConfig) -> None:
        super().__init__(ContrastiveConfig())
        self.rows = config.rows

    def forward(self, pairs: PairEmbeddings, scale: Tensor) -> Tensor:
        """Returns the scalar loss of this process's rows; `scale` is the factor on the cosines."""

        def loss(start: int, rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
            return row_entropy(pairs.first + start, rows, columns, scale)

        by_image = in_chunks(loss, self.rows, pairs.images, pairs.all_texts, scale)
        by_text = in_chunks(loss, self.rows, pairs.texts, pairs.all_images, scale)
        return (by_image + by_text) / (2 * len(pairs.images))


@dataclass
class SigmoidConfig:
    """Initial values (arXiv 2303.15343, section 3.2), what equal texts are to each other, and memory."""

    scale: float = option(10.0, "initial factor on the cosines, when training from random weights")
    bias: float = option(-10.0, "initial value of the learned bias; negative, as most pairs do not match")
    merge_equal: bool = option(True, "identical captions count as positives instead of negatives")
    rows: int = option(0, "rows of the similarity matrix computed at a time; 0: all")

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise InputError(f"objective.scale must be above 0, found {self.scale}")
        if self.rows < 0:
            raise InputError(f"objective.rows must be at least 0, found {self.rows}")


class Sigmoid(nn.Module):
    """SigLIP's sigmoid loss: each pair of the batch is decided alone (arXiv 2303.15343, section 3.2).

    Attributes:
        name: what the loss is called in the log.
        initial_logit_scale: what training from random weights begins with.
        merge_equal: whether equal texts are positives of each other's images.
        bias: scalar, learned, added to the scaled cosines; kept in training checkpoints, not in CLIP's
            weights, since it moves all scores alike.
    """

    name = "sigmoid"

    def __init__(self, config: SigmoidConfig) -> None:
        super().__init__()
        self.initial_logit_scale: float | None = math.log(config.scale)
        self.merge_equal, self.rows = config.merge_equal, config.rows
        self.bias = nn.Parameter(torch.tensor(config.bias))

    def forward(self, pairs: PairEmbeddings, scale: Tensor) -> Tensor:
        """Returns the scalar loss of this process's rows; `scale` is the factor on the cosines."""
        groups = pairs.groups
        if groups is None:
            groups = torch.arange(len(pairs.all_texts), device=pairs.texts.device)

        def loss(start: int, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            logits = scale * rows @ columns.T + bias  # [n, B]
            first = pairs.first + start
            same = groups[first : first + len(rows), None] == groups
            return -F.logsigmoid(torch.where(same, logits, -logits)).sum()

        chunk = self.rows or len(pairs.images)
        total = in_chunks(loss, chunk, pairs.images, pairs.all_texts, scale, self.bias)
        return total / len(pairs.images)


def in_chunks(loss: Callable[..., Tensor], size: int, rows: Tensor, *shared: Tensor) -> Tensor:
    """Returns the sum over chunks of rows of the scalar `loss(start, rows[start : start + size], *shared)`.

    Gradients reach `rows` and `shared`; they are computed with the value, chunk by chunk, and cost no memory
    beyond one chunk's. They cannot be differentiated again.
    """
    return cast(Tensor, _InChunks.apply(loss, size, rows, *shared))


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], size: int, rows: Tensor, *shared: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        inputs = (rows, *shared)
        total = rows.new_zeros(())
        gradients = [
            torch.zeros_like(value) if want else None for value, want in zip(inputs, wanted, strict=True)
        ]
        for start in range(0, len(rows), size):
            pieces = (rows[start : start + size], *shared)
            leaves = [piece.detach().requires_grad_(want) for piece, want in zip(pieces, wanted, strict=True)]
            with torch.set_grad_enabled(any(wanted)):
                value = loss(start, *leaves)
            total += value.detach()
            if not any(wanted):
                continue
            found = iter(torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad]))
            for place, gradient in enumerate(gradients):
                if gradient is not None:
                    (gradient[start : start + size] if place == 0 else gradient).add_(next(found))
        ctx.gradients = gradients
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if kept is None else kept * gradient for kept in ctx.gradients]
        return None, None, *scaled
