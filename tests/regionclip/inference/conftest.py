"""Images and videos to detect in, and the options of detecting there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from clip_base.images.video import writing_video


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """A folder of four images."""
    return shutil.copytree(world / "images" / "val", tmp_path / "photos")


@pytest.fixture
def options(detector_file: Path, tmp_path: Path) -> list[str]:
    out = f"out={tmp_path / 'found'}"
    return [f"weights={detector_file}", "vocabulary=cup, star", "resize.short=[64]", "resize.long=96", out]


@pytest.fixture
def clip(photos: Path, tmp_path: Path) -> Path:
    """A video of ten frames: two images, five times each."""
    path = tmp_path / "clip.mp4"
    with writing_video(path, 5.0) as writer:
        for number in range(10):
            writer.add(Image.open(sorted(photos.iterdir())[number // 5]).convert("RGB").resize((64, 64)))
    return path
