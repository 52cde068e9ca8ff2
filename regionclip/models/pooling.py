"""RoIAlign as a weighted sum: each bin of a region is a sum of map cells with row and column weights."""

# B images, N regions in all, C channels of the map, H, W its sides, s bins of a region along one side
from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

FEW_PRODUCTS = 4096
"""Bins of a region times cells of the map up to which every bin is summed over all cells of the map: that is
less work than to cut each region's window out of it. 4 by 4 bins on 16 by 16 cells are as many."""


def pool_regions(feature_map: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """Returns the regions' own maps by RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3).

    What torchvision's `roi_align(…, sampling_ratio=0, aligned=True)` computes, of which this takes an eighth
    of the time on a processor when the map is channels-last and no gradient is asked for, and less for both
    when the map is small; else, and in graphs that are exported, it is called.

    Args:
        feature_map: [B, C, H, W].
        rois: [N, 5] float32: image index and box (x1, y1, x2, y2) in pixels.
        side: s.
        scale: cells of the map per pixel.

    Returns:
        [N, C, s, s], channels-last, of the map's type; computed in float32.
    """
    small = _on_processor(feature_map) and _is_small(side, feature_map.shape[-2:])
    if not (small or pools_by_products(feature_map)):
        aligned: Tensor = roi_align(feature_map.float(), rois, side, scale, 0, aligned=True)
        return aligned.to(feature_map.dtype).contiguous(memory_format=torch.channels_last)
    down, across = region_weights(rois, side, scale, feature_map.shape[-2:])
    return pool_windows(feature_map, rois[:, 0].long(), down, across)


def pools_by_products(feature_map: Tensor) -> bool:
    """Whether regions of any such map are pooled by `pool_windows`: on a processor, without gradients."""
    asked = feature_map.requires_grad and torch.is_grad_enabled()
    return not asked and _on_processor(feature_map)


def _on_processor(feature_map: Tensor) -> bool:
    return feature_map.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_small(side: int, extent: torch.Size) -> bool:
    """Whether regions of s by s bins of a map with sides (H, W) are pooled by `_pool_small`."""
    return side**2 * extent.numel() <= FEW_PRODUCTS


def region_weights(rois: Tensor, side: int, scale: float, extent: torch.Size) -> tuple[Tensor, Tensor]:
    """Returns with which weights regions take the rows [N, s, H] and the columns [N, s, W] of a map.

    Args:
        rois: see `pool_regions`.
        side: s.
        scale: cells of the map per pixel.
        extent: (H, W).
    """
    height, width = extent
    edges = rois[:, 1:].float() * scale - 0.5
    down = bin_weights(edges[:, 1], edges[:, 3], side, height)
    return down, bin_weights(edges[:, 0], edges[:, 2], side, width)


def pool_windows(feature_map: Tensor, image_index: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Returns [N, C, s, s], channels-last: the weighted sums of the map's cells, computed in float32.

    Args:
        feature_map: [B, C, H, W], channels-last; with a gradient only if it is small, see `FEW_PRODUCTS`.
        image_index: [N], the image of each region.
        down: [N, s, H], see `region_weights`.
        across: [N, s, W].
    """
    side = down.shape[1]
    cells = feature_map.permute(0, 2, 3, 1)  # [B, H, W, C]
    if _is_small(side, feature_map.shape[-2:]):
        return _pool_small(cells, image_index, down, across).to(feature_map.dtype)
    pooled = feature_map.new_empty(len(down), side, side, feature_map.shape[1])  # [N, s, s, C]
    spans = zip(image_index.tolist(), _spans(down), _spans(across), strict=True)
    for region, (image, (top, bottom), (left, right)) in enumerate(spans):
        window = cells[image, top:bottom, left:right].float()  # [h, w, C], what the region looks at
        rows = (down[region, :, top:bottom] @ window.flatten(1)).view(side, *window.shape[1:])  # [s, w, C]
        pooled[region] = across[region, :, left:right] @ rows  # [s, s, C]
    return pooled.permute(0, 3, 1, 2)


def _pool_small(cells: Tensor, image_index: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Returns what `pool_windows` does, by one product per image of [B, H, W, C]; it has a gradient."""
    count, side, _ = down.shape
    with torch.autocast(cells.device.type, enabled=False):
        weights = (down[:, :, None, :, None] * across[:, None, :, None, :]).flatten(3)  # [N, s, s, H·W]
        order = image_index.argsort(stable=True)
        regions = image_index.bincount(minlength=len(cells)).tolist()
        flat = cells.float().flatten(1, 2)  # [B, H·W, C]
        pooled = [
            some.flatten(0, 2) @ flat[image]  # [n · s · s, C]
            for image, some in enumerate(torch.split(weights[order], regions))
        ]
        found = torch.cat(pooled).view(count, side, side, cells.shape[3])[order.argsort()]
    return found.permute(0, 3, 1, 2)


def bin_weights(starts: Tensor, ends: Tensor, side: int, extent: int) -> Tensor:
    """Returns with which weight each bin of a region takes each cell, along one axis.

    A bin is the mean of its samples, one for each cell that it begins; a sample lies between two cells and
    takes of each what is left of a cell's width. Samples beyond the map take nothing.

    Args:
        starts: [N], where the regions begin, in cells.
        ends: [N], where they end.
        side: s, bins a region.
        extent: E, cells of the map along this axis.

    Returns:
        [N, s, E].
    """
    lengths = (ends - starts) / side  # of a bin
    samples = lengths.ceil().clamp(min=0)  # [N]
    number = torch.arange(_most_samples(samples, side, extent), device=starts.device)  # [k]
    offsets = (number + 0.5) / samples.clamp(min=1)[:, None]  # [N, k], in bins
    bins = torch.arange(side, device=starts.device)[:, None] + offsets[:, None]  # [N, s, k]
    points = starts[:, None, None] + bins * lengths[:, None, None]
    taken = (points >= -1) & (points <= extent) & (number < samples[:, None, None])
    points = points.clamp(0, extent - 1)
    weights = 1 - (points[..., None] - torch.arange(extent, device=starts.device)).abs()  # [N, s, k, E]
    weights = weights.clamp(min=0) * taken[..., None]
    return weights.sum(2) / samples.clamp(min=1)[:, None, None]


def _most_samples(samples: Tensor, side: int, extent: int) -> int:
    if torch.compiler.is_compiling():
        # A graph cannot ask a tensor for a number; there boxes are cut at the image's edges. One more than
        # there can be, as PyTorch makes another graph of a side of 1.
        return (extent + side - 1) // side + 1
    return max(int(samples.max()) if len(samples) else 0, 1)


def _spans(weights: Tensor) -> list[tuple[int, int]]:
    """Returns for each region of weights [N, s, E] the first cell it takes and the one after the last."""
    taken = (weights > 0).any(1).byte()  # [N, E]
    first = taken.argmax(1)
    end = taken.shape[1] - taken.flip(1).argmax(1)
    return list(zip(first.tolist(), end.tolist(), strict=True))
