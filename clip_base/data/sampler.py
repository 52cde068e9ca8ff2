"""The order of samples in an epoch, from a generator's seed and optional weights."""

# N samples, E positions in an epoch
from __future__ import annotations

import torch
from torch import Tensor

from clip_base.runtime.errors import InputError


def epoch_length(size: int, weights: Tensor | None = None) -> int:
    """Returns E, the number of positions in an epoch: `size`, or the sum of the weights, rounded."""
    if weights is None:
        return size
    if weights.shape != (size,):
        raise ValueError(f"weights must be [{size}], one per sample, got {list(weights.shape)}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise InputError("weights must be finite and not negative")
    length = round(float(weights.double().sum()))
    if length < 1:
        raise InputError(f"the weights leave {length} samples per epoch; increase them")
    return length


def epoch_order(
    size: int, generator: torch.Generator, weights: Tensor | None = None, replacement: bool = False
) -> Tensor:
    """Returns [E] int64, the samples of one epoch in the order in which they are shown.

    Args:
        size: N, number of samples.
        generator: all chance comes from it.
        weights: [N], how often an epoch shows each sample on average; None: once. Weight w is shown at
            least floor(w) and at most ceil(w) times (systematic sampling over shuffled samples).
        replacement: draw each position on its own, in proportion to the weights.
    """
    if weights is None:
        if replacement:
            return torch.randint(size, (size,), generator=generator)
        return torch.randperm(size, generator=generator)
    length = epoch_length(size, weights)
    # Shuffled before they are laid end to end: each epoch leaves out other samples.
    shuffled = torch.randperm(size, generator=generator)
    ends = weights.double()[shuffled].cumsum(0)  # [N]
    if replacement:
        points = torch.rand(length, generator=generator, dtype=torch.float64)
    else:
        points = torch.arange(length) + torch.rand(1, generator=generator, dtype=torch.float64)
        points = points / length
    # A point on an end belongs to the next sample: samples of no weight are never drawn.
    places = torch.searchsorted(ends, points * ends[-1], right=True)
    last = int(torch.searchsorted(ends, ends[-1]))  # rounding may push a point onto the very end
    drawn = shuffled[places.clamp(max=last)]
    return drawn[torch.randperm(length, generator=generator)]
