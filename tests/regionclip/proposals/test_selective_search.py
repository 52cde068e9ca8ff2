"""Selective search: boxes of what it finds, in an order that is the same every time; absent, it says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import normalize
from clip_base.runtime.errors import InputError
from regionclip.proposals.selective_search import SelectiveSearchConfig, SelectiveSearchProposer
from regionclip.structures.boxes import iou
from regionclip.structures.regions import ImageInfo, Regions

AssertInside = Callable[[Regions, ImageBatch], None]
Rows = Sequence[tuple[int, int, int, int]]


class FakeSearch:
    """Remembers what it was shown; returns given (x, y, width, height) in another order each time."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.calls = list(rows), 0
        self.image: Any = None
        self.mode = ""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        segmentation = SimpleNamespace(createSelectiveSearchSegmentation=lambda: self)
        monkeypatch.setattr(cv2, "ximgproc", SimpleNamespace(segmentation=segmentation), raising=False)

    def setBaseImage(self, image: Any) -> None:  # noqa: N802
        self.image = image

    def switchToSelectiveSearchFast(self) -> None:  # noqa: N802
        self.mode = "fast"

    def switchToSelectiveSearchQuality(self) -> None:  # noqa: N802
        self.mode = "quality"

    def process(self) -> Any:
        self.calls += 1
        return np.roll(np.array(self.rows, np.int32).reshape(-1, 4), self.calls, axis=0)


def batch_of(*sizes: tuple[int, int]) -> tuple[ImageBatch, list[ImageInfo]]:
    """Returns orange images with a blue block each, and their keys."""
    images = []
    for height, width in sizes:
        image = torch.tensor([255, 128, 0], dtype=torch.uint8)[:, None, None].repeat(1, height, width)
        image[:, height // 4 : height // 2, width // 4 : width // 2] = torch.tensor([0, 0, 255])[
            :, None, None
        ]
        images.append(normalize(image))
    keys = [ImageInfo(number, *size) for number, size in enumerate(sizes)]
    return ImageBatch.pad(images, 32), keys


def test_boxes_come_back_to_the_batchs_frame(
    monkeypatch: pytest.MonkeyPatch, assert_inside: AssertInside
) -> None:
    search = FakeSearch([(0, 0, 50, 40), (10, 5, 20, 30), (10, 5, 20, 30), (1, 1, 2, 30)])
    search.install(monkeypatch)
    images, keys = batch_of((80, 100))
    found = SelectiveSearchProposer(SelectiveSearchConfig(side=50))(images, keys)
    assert search.image.shape == (40, 50, 3)
    assert search.image[0, 0].tolist() == [0, 128, 255]  # BGR
    assert search.mode == "fast"
    assert_inside(found, images)
    assert sorted(found.boxes.tolist()) == [[0, 0, 100, 80], [20, 10, 60, 70]]
    assert found.scores is not None
    assert found.scores.tolist() == [1, 1]


def test_the_order_is_the_images_own_and_favors_large_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(0, 0, 10 + side, 10 + side) for side in range(80)]
    FakeSearch(rows).install(monkeypatch)
    images, _ = batch_of(*[(96, 96)] * 40)
    keys = [ImageInfo(7 + slot % 20, 96, 96) for slot in range(40)]
    found = SelectiveSearchProposer(SelectiveSearchConfig(limit=20))(images, keys)
    per_image = [found.of_image(slot).boxes for slot in range(40)]
    assert {len(boxes) for boxes in per_image} == {20}
    assert torch.equal(per_image[0], per_image[20])
    assert not torch.equal(per_image[0], per_image[1])
    first, last = (torch.stack([boxes[place, 2] for boxes in per_image]).mean() for place in (0, 19))
    assert float(first) > float(last) + 10
    assert float(torch.cat(per_image)[:, 2].min()) < 25


def test_nothing_found_is_no_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeSearch([]).install(monkeypatch)
    images, keys = batch_of((32, 32))
    assert len(SelectiveSearchProposer(SelectiveSearchConfig(mode="quality"))(images, keys)) == 0


def test_without_the_extra_it_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "ximgproc", raising=False)
    with pytest.raises(InputError, match=r"pip install 'regionclip\[selective-search\]'"):
        SelectiveSearchProposer(SelectiveSearchConfig())


@pytest.mark.parametrize("options", [{"side": -1}, {"limit": 0}, {"min_size": -1.0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be at least 0"):
        SelectiveSearchConfig(**options)


@pytest.mark.skipif(not hasattr(cv2, "ximgproc"), reason="OpenCV's contributed modules are not installed")
@pytest.mark.parametrize("mode", ["fast", "quality"])
def test_opencvs_search_finds_the_block_and_repeats_itself(mode: str, assert_inside: AssertInside) -> None:
    images, keys = batch_of((96, 128), (120, 90))
    proposer = SelectiveSearchProposer(SelectiveSearchConfig(mode=mode))
    found, again = proposer(images, keys), proposer(images, keys)
    assert_inside(found, images)
    assert torch.equal(found.boxes, again.boxes)
    for slot, (height, width) in enumerate(images.sizes.tolist()):
        block = torch.tensor([[width // 4, height // 4, width // 2, height // 2]]).float()
        assert float(iou(block, found.of_image(slot).boxes).max()) > 0.8
