"""Interpolation of position embeddings to another grid."""

# S side of the trained grid, C channels
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resample_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Returns position embeddings for a grid of `height` by `width` cells.

    The first row (class token, or the attention pool's mean) is kept, the rest is resampled bicubically with
    antialiasing, as open_clip does when it loads weights at another resolution. For the trained grid the
    input comes back as it is.

    Args:
        positions: [1 + S·S, C], row-major grid.
        height: rows of the new grid.
        width: columns of the new grid.

    Returns:
        [1 + height·width, C], differentiable with respect to `positions`.
    """
    side = round((len(positions) - 1) ** 0.5)
    if (height, width) == (side, side):
        return positions
    grid = positions[1:].float().T.reshape(1, -1, side, side)  # [1, C, S, S]
    grid = F.interpolate(grid, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])  # [1 + h·w, C]
