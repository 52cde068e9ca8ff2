"""Boxes from a file are scaled to the frame, cut, sorted; malformed entries are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.data.batch import ImageBatch
from clip_base.runtime.errors import InputError
from regionclip.proposals.precomputed import PrecomputedConfig, PrecomputedProposer
from regionclip.structures.regions import ImageInfo, Regions

AssertInside = Callable[[Regions, ImageBatch], None]
BatchOf = Callable[..., ImageBatch]


def write_results(path: Path, *rows: tuple[int, list[float], float]) -> str:
    path.write_text(
        json.dumps([{"image_id": i, "category_id": 1, "bbox": b, "score": s} for i, b, s in rows])
    )
    return str(path)


def test_precomputed_boxes_are_scaled_cut_sorted_and_limited(tmp_path: Path, batch_of: BatchOf) -> None:
    file = write_results(
        tmp_path / "p.json",
        (7, [10, 20, 30, 40], 0.4),
        (7, [90, 0, 50, 50], 0.9),
        (7, [120, 0, 10, 10], 0.8),
        (7, [0, 0, 10, 10], 0.3),
        (8, [0, 0, 10, 10], 0.05),
    )
    proposer = PrecomputedProposer(PrecomputedConfig(file, limit=2, min_score=0.1))
    keys = [ImageInfo(9, 10, 10), ImageInfo(7, 100, 100), ImageInfo(8, 50, 50)]
    found = proposer(batch_of((10, 10), (50, 200), (50, 50)), keys)
    assert found.image_index.tolist() == [1, 1]
    # Image 7 is drawn half as high and twice as wide; its box beyond the right edge is left out.
    assert found.boxes.tolist() == [[180, 0, 200, 25], [20, 10, 80, 30]]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.4]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1, [0, 0, 5], 0.5), "entry 0 needs a 'bbox' of four"),
        ((1, [0, 0, -5, 5], 0.5), "entry 0: bbox must be four"),
        ((1, [0, 0, 5, 5], 3.2), "apply a sigmoid"),
        (("x", [0, 0, 5, 5], 0.5), "needs a whole number 'image_id'"),
    ],
)
def test_malformed_precomputed_entries_are_named(tmp_path: Path, row: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrecomputedProposer(PrecomputedConfig(write_results(tmp_path / "p.json", row)))


def test_precomputed_reads_real_proposals(
    shared_data: Path, assert_inside: AssertInside, batch_of: BatchOf
) -> None:
    folder = shared_data / "coco_mini"
    file = folder / "proposals_yolox_nano_val.json"
    images = json.loads((folder / "instances_val.json").read_text())["images"]
    keys = [ImageInfo(image["id"], image["height"], image["width"]) for image in images[:4]]
    batch = batch_of(*((key.height // 2, key.width // 2) for key in keys))
    found = PrecomputedProposer(PrecomputedConfig(str(file)))(batch, keys)
    assert found.image_index.bincount(minlength=4).tolist() == [100] * 4
    assert_inside(found, batch)
