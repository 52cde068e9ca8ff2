"""Pooling regions by matrix products gives what torchvision's RoIAlign gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from regionclip.models.pooling import bin_weights, pool_regions


def some_map(height: int, width: int, batch: int = 2, channels: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    cells = torch.randn(batch, channels, height, width, generator=generator)
    return cells.contiguous(memory_format=torch.channels_last)


def some_rois(height: int, width: int, count: int = 60, batch: int = 2) -> Tensor:
    """Returns rois of all sizes, some of them beyond the edges of a map of these many cells of 16 pixels."""
    generator = torch.Generator().manual_seed(1)
    extent = torch.tensor([width, height]) * 16.0
    corner = (torch.rand(count, 2, generator=generator) * 1.2 - 0.1) * extent
    size = torch.rand(count, 2, generator=generator) ** 2 * extent
    image = torch.randint(batch, (count, 1), generator=generator)
    return torch.cat([image, corner, corner + size], 1)


@pytest.mark.parametrize("side", [1, 4, 7, 14])
@pytest.mark.parametrize("size", [(1, 1), (4, 5), (20, 33)])
def test_regions_are_torchvisions(side: int, size: tuple[int, int]):
    cells, rois = some_map(*size), some_rois(*size)
    found = pool_regions(cells, rois, side, 1 / 16)
    wanted = roi_align(cells, rois, side, 1 / 16, 0, aligned=True)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_region_that_is_the_map_is_the_map():
    cells = some_map(7, 7, batch=1)
    found = pool_regions(cells, torch.tensor([[0.0, 0, 0, 112, 112]]), 7, 1 / 16)
    torch.testing.assert_close(found, cells, atol=1e-5, rtol=1e-5)


def test_empty_and_faraway_regions_are_zero_as_torchvisions():
    cells = some_map(5, 5)
    rois = torch.tensor(
        [[0.0, 20, 20, 20, 20], [1, 500, 500, 600, 600], [1, -90, 0, -80, 40], [0, 30, 30, 10, 40]]
    )
    wanted = roi_align(cells, rois, 4, 1 / 16, 0, aligned=True)
    torch.testing.assert_close(pool_regions(cells, rois, 4, 1 / 16), wanted)
    assert pool_regions(cells, rois[:0], 4, 1 / 16).shape == (0, 24, 4, 4)


def test_half_precision_is_rounded_once():
    cells, rois = some_map(20, 33).bfloat16(), some_rois(20, 33)
    found = pool_regions(cells, rois, 14, 1 / 16)
    wanted = roi_align(cells.float(), rois, 14, 1 / 16, 0, aligned=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize("size", [(6, 8), (20, 33)])
def test_gradients_are_torchvisions(size: tuple[int, int]):
    rois = some_rois(*size, 10)
    maps = [some_map(*size).requires_grad_() for _ in range(2)]
    pool_regions(maps[0], rois, 4, 1 / 16).square().sum().backward()
    roi_align(maps[1], rois, 4, 1 / 16, 0, aligned=True).square().sum().backward()
    torch.testing.assert_close(maps[0].grad, maps[1].grad)


def test_an_image_without_regions_takes_none():
    cells, rois = some_map(6, 8, batch=3), some_rois(6, 8, 10, batch=1)
    rois[::2, 0] = 2
    found = pool_regions(cells, rois, 4, 1 / 16)
    torch.testing.assert_close(
        found, roi_align(cells, rois, 4, 1 / 16, 0, aligned=True), atol=1e-4, rtol=1e-4
    )


def test_the_weights_of_a_bin_within_the_map_sum_to_one():
    weights = bin_weights(torch.tensor([0.0, 2.3]), torch.tensor([4.0, 9.0]), 5, 10)
    assert weights.shape == (2, 5, 10)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 5))
