"""`teacher_scale=auto`: the teacher sees images at the size that it was trained at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.data.batch import ImageBatch
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.native import save_clip
from regionclip.mining.scale import CELL, choose_scale, trained_at
from regionclip.mining.shards import read_manifest, read_regions
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.teachers.base import RegionView
from regionclip.models.teachers.mixed import MixedRegions
from regionclip.structures.regions import Regions

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("trained", "image_side", "box_side", "scale"),
    [
        (64, 128, 60, 0.5),  # as trained
        (224, 800, 150, 0.28),
        (224, 800, 40, 0.4),  # half of the proposals would be smaller than a cell
        (224, 800, 10, 1.0),  # no detail is added to the images
        (448, 224, 100, 2.0),  # but to those that are smaller than in training
    ],
)
def test_the_scale_is_that_of_training_unless_proposals_would_be_too_small(
    trained: int, image_side: float, box_side: float, scale: float
) -> None:
    choice = choose_scale(trained, image_side, box_side, CELL)
    assert choice.scale == scale
    assert f"images of {trained} pixels" in choice.reason
    assert ("smaller than the 16 pixels" in choice.reason) == (box_side < 50)


def test_a_file_says_at_which_size_it_was_trained_last(
    make_clip: Callable[..., CLIP], tmp_path: Path
) -> None:
    for notes, expected in (({}, 64), ({"trained_at": "128"}, 128), ({"trained_at": "much"}, 64)):
        save_clip(make_clip(), tmp_path / "clip.safetensors", notes)
        assert trained_at(str(tmp_path / "clip.safetensors"), 64) == expected


def test_the_choice_is_told_kept_and_the_same_as_the_number(
    mining_options: list[str], tmp_path: Path, regionclip: Command, swapped: Swap
) -> None:
    options = swapped(mining_options, **{"resize.short": "[128]", "resize.long": 128, "teacher": "roi_align"})
    code, told = regionclip("mine", *options, "teacher_scale=auto", f"out={tmp_path / 'auto'}")
    assert code == 0, told
    assert "teacher_scale=auto: 0.5; the teacher was trained on images of 64 pixels" in told
    manifest = read_manifest(tmp_path / "auto")
    assert manifest["config"]["teacher_scale"] == 0.5
    assert "64 pixels" in manifest["teacher_scale_reason"]
    assert read_json(tmp_path / "auto" / "teacher_scale.json")["scale"] == 0.5
    for name, scale in (("same", 0.5), ("other", 1)):
        assert regionclip("mine", *options, f"teacher_scale={scale}", f"out={tmp_path / name}")[0] == 0
    auto, same, other = (list(read_regions(tmp_path / name)) for name in ("auto", "same", "other"))
    assert auto == same
    assert auto != other


def test_crops_need_no_scale(
    mining_options: list[str], tmp_path: Path, regionclip: Command, swapped: Swap
) -> None:
    options = swapped(mining_options, teacher="crop", teacher_scale="auto", out=tmp_path / "mined")
    code, told = regionclip("mine", *options)
    assert code == 0, told
    assert "teacher_scale=auto: 1; crops are resized" in told


def test_small_regions_are_cropped_and_large_ones_pooled(make_clip: Callable[..., CLIP]) -> None:
    visual = make_clip().visual
    images = ImageBatch.whole(torch.randn(2, 3, 64, 96))
    boxes = torch.tensor([[0.0, 0, 40, 30], [10, 10, 20, 30], [5, 5, 60, 60], [0, 0, 30, 31]])
    regions = Regions(boxes, torch.tensor([0, 0, 1, 1]))
    view = RegionView("mixed", 1.5, 0.5, crop_below=18.0)  # 36 pixels of the images
    with torch.no_grad():
        found = MixedRegions(visual, view)(images, regions)
        crops = RegionEncoder(visual, "crop", 1.5)(images, regions)
        pooled = RegionEncoder(visual, "roi_align", scale=0.5)(images, regions)
    small = torch.tensor([False, True, False, True])[:, None]
    torch.testing.assert_close(found, torch.where(small, crops, pooled), rtol=0, atol=1e-5)
    assert (crops - pooled).abs().amax(1).min() > 1e-3
    with pytest.raises(InputError, match="needs a ResNet"):
        MixedRegions(make_clip(kind="vit").visual, view)
    with pytest.raises(InputError, match="crop_below"):
        MixedRegions(visual, RegionView("mixed", crop_below=0))


def test_mining_with_both_views_is_that_of_each_for_its_regions(
    mining_options: list[str], tmp_path: Path, regionclip: Command, swapped: Swap
) -> None:
    found = {}
    for name, more in (("mixed", ("crop_below=1000",)), ("crop", ())):
        options = swapped(mining_options, teacher=name, out=tmp_path / name)
        code, told = regionclip("mine", *options, *more)
        assert code == 0, told
        found[name] = list(read_regions(tmp_path / name))
    assert found["mixed"] == found["crop"]
