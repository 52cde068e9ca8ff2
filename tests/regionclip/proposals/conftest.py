"""Tiny networks, bright rectangles to find, and what must hold of all proposals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.data.batch import ImageBatch
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.weights.native import save_clip
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.structures.regions import RegionBatch, Regions

VISION = VisionConfig(layers=[1, 1, 1, 1], width=16, resolution=64)


def _small(**options: object) -> ProposalNetworkConfig:
    values = {"vision": VISION, "channels": 32, "anchor_sizes": [16.0, 24.0, 32.0, 48.0], **options}
    return ProposalNetworkConfig(**values)  # type: ignore[arg-type]


def _rectangles(count: int, seed: int) -> RegionBatch:
    """Returns dark noisy images of different sizes in a 96 pixel frame, two bright rectangles in each."""
    generator = torch.Generator().manual_seed(seed)
    images, boxes, index = [], [], []
    for number in range(count):
        height, width = (int(v) for v in torch.randint(72, 97, (2,), generator=generator))
        image = torch.randn(3, height, width, generator=generator) * 0.1 - 1
        for half in range(2):
            sides = torch.randint(18, 34, (2,), generator=generator).tolist()
            left = half * width // 2 + int(
                torch.randint(0, width // 2 - sides[0] + 1, (1,), generator=generator)
            )
            top = int(torch.randint(0, height - sides[1] + 1, (1,), generator=generator))
            image[:, top : top + sides[1], left : left + sides[0]] += 2
            boxes.append([left, top, left + sides[0], top + sides[1]])
            index.append(number)
        images.append(image)
    regions = Regions(torch.tensor(boxes).float(), torch.tensor(index))
    return RegionBatch(ImageBatch.pad(images, 32), regions)


def _assert_inside(regions: Regions, images: ImageBatch) -> None:
    limits = images.sizes[regions.image_index].flip(-1).float()
    assert bool((regions.boxes >= 0).all())
    assert bool((regions.boxes[:, 2:] <= limits).all())
    assert bool((regions.boxes[:, 2:] > regions.boxes[:, :2]).all())


def _tiny_clip(folder: Path) -> Path:
    torch.manual_seed(5)
    text = TextConfig(width=32, heads=2, layers=1, vocab_size=64)
    path = folder / "clip.safetensors"
    save_clip(CLIP(CLIPConfig(32, VISION, text)), path)
    return path


def _batch_of(*sizes: tuple[int, int]) -> ImageBatch:
    return ImageBatch.pad([torch.zeros(3, *size) for size in sizes], 32)


@pytest.fixture(scope="session")
def small() -> Callable[..., ProposalNetworkConfig]:
    return _small


@pytest.fixture(scope="session")
def rectangles() -> Callable[[int, int], RegionBatch]:
    return _rectangles


@pytest.fixture(scope="session")
def assert_inside() -> Callable[[Regions, ImageBatch], None]:
    return _assert_inside


@pytest.fixture(scope="session")
def tiny_clip() -> Callable[[Path], Path]:
    return _tiny_clip


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., ImageBatch]:
    return _batch_of
