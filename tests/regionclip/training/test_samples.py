"""What the region stages train on: boxes, labels and concepts stay with their image."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from clip_base.data.loader import Loader
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from regionclip.data.annotations import CocoDetection
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.samples import GridPatchDataset, RegionDataset, Sample, patches

FIXED = TrainingResizeConfig([64], 64, flip=False)


@pytest.fixture(scope="module")
def records(world: Path) -> CocoDetection:
    return CocoDetection(world / "instances_train.json", world / "images")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_boxes_keep_their_labels_and_image(records: CocoDetection) -> None:
    data = RegionDataset([Sample.of_record(record) for record in records], FIXED)
    batch = data.collate([data.item(index, generator()) for index in (3, 0, 7)])
    for slot, index in enumerate((3, 0, 7)):
        mine = batch.regions.of_image(slot)
        torch.testing.assert_close(mine.boxes, records[index].boxes)
        assert mine.labels is not None
        assert torch.equal(mine.labels, records[index].labels)
    assert batch.tokens is None


def test_mirrored_images_have_mirrored_boxes(records: CocoDetection) -> None:
    data = RegionDataset([Sample.of_record(records[0])], TrainingResizeConfig([64], 64))
    seen = {}
    for seed in range(20):
        pixels, regions, _ = data.item(0, generator(seed))
        seen[float(regions.boxes[0, 0])] = pixels
    width, (x1, _, x2, _) = records[0].width, records[0].boxes[0].tolist()
    assert sorted(seen) == pytest.approx(sorted({x1, width - x2}))
    plain, mirrored = seen.values()
    assert (plain == mirrored[:, ::-1]).all()


def test_more_boxes_than_asked_for_are_sampled_without_mixing_rows(records: CocoDetection) -> None:
    boxes = torch.arange(40).reshape(10, 4).float()
    sample = Sample(
        records[0].path,
        boxes,
        torch.arange(10),
        torch.arange(10)[:, None].repeat(1, 2),
        torch.arange(10).float()[:, None].repeat(1, 2),
    )
    data = RegionDataset([sample], FIXED, max_boxes=4)
    drawn = set()
    for seed in range(30):
        _, regions, _ = data.item(0, generator(seed))
        rows = (regions.boxes[:, 0] / 4).long()
        assert len(set(rows.tolist())) == 4
        assert regions.labels is not None
        assert regions.concept_ids is not None
        assert regions.concept_probs is not None
        assert torch.equal(regions.labels, rows)
        assert torch.equal(regions.concept_ids[:, 1], rows)
        assert torch.equal(regions.concept_probs[:, 0], rows.float())
        drawn |= set(rows.tolist())
    assert drawn == set(range(10))


def test_an_image_without_boxes_stays_in_the_batch(records: CocoDetection) -> None:
    empty = Sample(records[1].path, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    data = RegionDataset([Sample.of_record(records[0]), empty], FIXED)
    batch = data.collate([data.item(index, generator()) for index in (1, 0)])
    assert len(batch.images) == 2
    assert set(batch.regions.image_index.tolist()) == {1}


def test_every_caption_is_drawn_and_tokenized(records: CocoDetection) -> None:
    sample = Sample(records[0].path, torch.zeros(0, 4), captions=("a cup", "a star"))
    data = RegionDataset([sample], FIXED, tokenizer=Tokenizer(16))
    captions = [data.item(0, generator(seed))[2] for seed in range(20)]
    assert set(captions) == {"a cup", "a star"}
    tokens = data.collate([data.item(0, generator(seed)) for seed in range(2)]).tokens
    assert tokens is not None
    assert tokens.shape == (2, 16)


def test_an_image_without_a_caption_has_tokens_of_zero(records: CocoDetection) -> None:
    samples = [
        Sample(record.path, torch.zeros(0, 4), captions=captions)
        for record, captions in zip(records, (("a cup",), (), ("a star",)), strict=False)
    ]
    data = RegionDataset(samples, FIXED, tokenizer=Tokenizer(16))
    tokens = data.collate([data.item(index, generator()) for index in range(3)]).tokens
    assert tokens is not None
    assert tokens.any(1).tolist() == [True, False, True]


def test_boxes_follow_what_is_done_to_their_image(tmp_path: Path) -> None:
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[30:75, 16:80] = 255
    cv2.imwrite(str(tmp_path / "one.png"), pixels)
    sample = Sample(tmp_path / "one.png", torch.tensor([[16.0, 30.0, 80.0, 75.0]]))
    data = RegionDataset([sample], TrainingResizeConfig([48, 96, 144], 160))
    frames = set()
    for seed in range(12):
        placed, regions, _ = data.item(0, generator(seed))
        rows, columns = np.nonzero(placed[:, :, 0] > 127)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert regions.boxes[0].tolist() == pytest.approx(found, abs=1.5)
        frames.add((placed.shape[0], columns.min() > 0.3 * placed.shape[1]))
    assert len(frames) == 6  # three sizes, mirrored or not


def test_patches_tile_the_image() -> None:
    boxes = patches(60, 90, 3, 2)
    assert boxes.tolist() == [[x, y, x + 45, y + 20] for x in (0.0, 45.0) for y in (0.0, 20.0, 40.0)]


def test_patches_are_drawn_anew_each_time_within_the_limits(records: CocoDetection) -> None:
    data = GridPatchDataset([Sample.of_record(records[0])], 4, FIXED, max_boxes=10)
    counts = set()
    for seed in range(60):
        pixels, regions, _ = data.item(0, generator(seed))
        height, width = pixels.shape[:2]
        sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
        columns, rows = (torch.tensor([width, height]) / sides[0]).round().int().tolist()
        torch.testing.assert_close(sides, torch.tensor([[width / columns, height / rows]]).expand_as(sides))
        assert len(regions) == len(torch.unique(regions.boxes, dim=0)) == min(rows * columns, 10)
        counts.add((rows, columns))
    assert counts == {(rows, columns) for rows in range(1, 5) for columns in range(1, 5)}


def test_items_are_a_function_of_the_seed(records: CocoDetection) -> None:
    data = RegionDataset(
        [Sample.of_record(record) for record in records], TrainingResizeConfig([48, 64], 64), 1
    )
    first, second = (next(iter(Loader(data, data.collate, 4, seed=9))) for _ in range(2))
    assert torch.equal(first.images.pixels, second.images.pixels)
    assert torch.equal(first.regions.boxes, second.regions.boxes)


def test_a_cached_image_is_read_once(records: CocoDetection, tmp_path: Path) -> None:
    path = tmp_path / "one.jpg"
    path.write_bytes(records[0].path.read_bytes())
    sample = Sample(path, torch.zeros(0, 4))
    cached, fresh = RegionDataset([sample], FIXED, cache=True), RegionDataset([sample], FIXED)
    cached.item(0, generator())
    path.unlink()
    cached.item(0, generator())
    with pytest.raises(InputError, match=r"one\.jpg cannot be read"):
        fresh.item(0, generator())
