"""`compile=true` changes how a detector computes and not what it finds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import regionclip
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from regionclip.models.region_encoder import RegionEncoder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_trunk_finds_the_same(detector_file: Path, world: Path) -> None:
    images = sorted((world / "images" / "val").iterdir())[:2]
    plain, compiled = (
        regionclip.load(detector_file, "cup, star", precision="fp32", compile=compile)
        for compile in (False, True)
    )
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for image in images:
        wanted, found = plain.detect(image), compiled.detect(image)
        torch.testing.assert_close(found.boxes, wanted.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_a_tower_that_cannot_be_compiled_is_refused(make_clip: Callable[..., CLIP]) -> None:
    with pytest.raises(InputError, match="compile=true is for ResNet towers"):
        RegionEncoder(make_clip("vit").visual, "dense").compile()
