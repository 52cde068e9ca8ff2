"""The grid covers the image and stays inside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.runtime.errors import InputError
from regionclip.proposals.grid import GridConfig, GridProposer
from regionclip.structures.regions import ImageInfo, Regions

AssertInside = Callable[[Regions, ImageBatch], None]
BatchOf = Callable[..., ImageBatch]


def covered(boxes: Tensor, height: int, width: int) -> Tensor:
    seen = torch.zeros(height, width, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.round().long().tolist():
        seen[y1:y2, x1:x2] = True
    return seen


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 200), (131, 70)])
def test_the_grid_of_each_size_covers_the_image_and_stays_inside(height: int, width: int) -> None:
    for size in (0.25, 0.5, 1.0):
        boxes = GridProposer(GridConfig(sizes=[size])).boxes(height, width)
        assert bool(covered(boxes, height, width).all())
        assert bool((boxes >= 0).all())
        assert bool((boxes[:, 2:] <= torch.tensor([width, height])).all())
        assert len(boxes.unique(dim=0)) == len(boxes)


def test_the_grid_depends_on_the_unpadded_size_only(assert_inside: AssertInside, batch_of: BatchOf) -> None:
    images = batch_of((64, 48), (96, 96), (64, 48))
    found = GridProposer(GridConfig())(images, [ImageInfo(i, 64, 64) for i in range(3)])
    assert_inside(found, images)
    assert torch.equal(found.of_image(0).boxes, found.of_image(2).boxes)
    assert found.scores is not None
    assert found.scores.unique().tolist() == [1.0]


def test_a_grid_with_gaps_is_refused() -> None:
    with pytest.raises(InputError, match="gaps"):
        GridConfig(stride=1.5)
