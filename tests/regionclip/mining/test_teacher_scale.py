"""`teacher_scale=auto`: the teacher sees images at the size that it was trained at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clip_base.models.clip import CLIP
from clip_base.storage.files import read_json
from clip_base.weights.native import save_clip
from regionclip.mining.scale import CELL, choose_scale, trained_at
from regionclip.mining.shards import read_manifest, read_regions

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
