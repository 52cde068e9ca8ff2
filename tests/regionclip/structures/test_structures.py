"""Regions and batches refuse what does not fit, and lose nothing when cut and joined."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from clip_base.data.batch import ImageBatch
from regionclip.structures.regions import RegionBatch, Regions, whole_images


def regions(count: int = 4) -> Regions:
    corners = torch.arange(count, dtype=torch.float32)[:, None].expand(count, 2)
    return Regions(
        torch.cat([corners, corners + 5], 1),
        torch.arange(count) % 2,
        scores=torch.linspace(0, 1, count),
        labels=torch.arange(count),
        concept_ids=torch.arange(2 * count).reshape(count, 2),
        concept_probs=torch.rand(count, 2),
    )


def images() -> ImageBatch:
    return ImageBatch.pad([torch.ones(3, 20, 30), torch.ones(3, 24, 16)], multiple=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(4, 5)}, r"boxes must be \[any, 4\], got \[4, 5\]"),
        ({"boxes": torch.zeros(4, 4, dtype=torch.float64)}, "boxes must be torch.float32"),
        ({"image_index": torch.zeros(3, dtype=torch.int64)}, r"image_index must be \[4\], got \[3\]"),
        ({"image_index": torch.zeros(4)}, "image_index must be torch.int64"),
        ({"scores": torch.zeros(4, 1)}, "scores"),
        ({"labels": torch.zeros(4)}, "labels must be torch.int64"),
        ({"concept_probs": torch.zeros(4, 3)}, "concept_probs"),
        ({"concept_ids": None}, "concept_probs need concept_ids"),
    ],
)
def test_regions_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str):
    whole = regions()
    columns = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Regions(**(columns | change))


def test_regions_are_picked_by_mask_index_slice_and_number():
    whole = regions()
    for which in (torch.tensor([False, True, False, False]), torch.tensor([1]), slice(1, 2), 1, -3):
        picked = whole[which]
        assert len(picked) == 1
        assert picked.labels is not None
        assert picked.labels.tolist() == [1]
        assert picked.concept_ids is not None
        assert picked.concept_ids.tolist() == [[2, 3]]
    assert len(whole[-1]) == 1
    assert sum(len(one) for one in whole) == 4  # type: ignore[attr-defined]
    for missing in (4, -5):
        with pytest.raises(IndexError, match=f"no row {missing} of 4"):
            whole[missing]


def test_regions_of_the_images_joined_are_the_regions():
    whole = regions()
    joined = Regions.cat([whole.of_image(0), whole.of_image(1)])
    assert joined.labels is not None
    assert joined.labels.tolist() == [0, 2, 1, 3]
    assert joined.image_index.tolist() == [0, 0, 1, 1]
    assert len(Regions.cat([])) == 0


def test_regions_of_which_some_lack_a_column_are_not_joined():
    bare = Regions(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 of 2 parts have no scores"):
        Regions.cat([regions(), bare])


def test_whole_images_cover_the_image_and_not_its_padding():
    batch = images()
    whole = whole_images(batch)
    assert batch.pixels.shape[-2:] == (32, 32)
    assert whole.boxes.tolist() == [[0, 0, 30, 20], [0, 0, 16, 24]]
    assert roi_align(batch.pixels, whole.rois(), 2, aligned=True).mean() > 0.9


def test_a_batch_whose_regions_point_beyond_its_images_is_refused():
    with pytest.raises(ValueError, match=r"image_index must be in 0…1, got 5…5"):
        RegionBatch(images(), Regions(torch.zeros(1, 4), torch.tensor([5])))
    with pytest.raises(ValueError, match="tokens"):
        RegionBatch(images(), regions(), torch.zeros(3, 7, dtype=torch.int64))
    moved = RegionBatch(images(), regions(), torch.zeros(2, 7, dtype=torch.int64)).to("cpu")
    assert len(moved.regions) == 4
