"""Regions, batches and detections refuse what does not fit, and lose nothing when cut and joined."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from clip_base.batch import ImageBatch
from regionclip.structures import Detections, RegionBatch, Regions, whole_images

NAMES = ("cat", "dog", "umbrella")


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


def detections() -> Detections:
    boxes = torch.tensor([[0.0, 1, 10, 21], [5, 5, 30.25, 40.5], [1, 2, 3, 4]])
    return Detections(boxes, torch.tensor([0.9, 0.2, 0.5]), torch.tensor([1, 0, 1]), NAMES, (48, 64))


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
        ({"concept_ids": None}, "whose probabilities"),
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
    with pytest.raises(ValueError, match=r"image_index must lie in 0…1, got 5…5"):
        RegionBatch(images(), Regions(torch.zeros(1, 4), torch.tensor([5])))
    with pytest.raises(ValueError, match="tokens"):
        RegionBatch(images(), regions(), torch.zeros(3, 7, dtype=torch.int64))
    moved = RegionBatch(images(), regions(), torch.zeros(2, 7, dtype=torch.int64)).to("cpu")
    assert len(moved.regions) == 4


def test_detections_survive_cocos_form():
    found = detections()
    entries = found.to_coco(42, [17, 18, 28])
    assert entries[1] == {
        "image_id": 42,
        "category_id": 17,
        "bbox": [5, 5, 25.25, 35.5],
        "score": pytest.approx(0.2),
    }
    back = Detections.from_coco(entries, [17, 18, 28], NAMES, (48, 64))
    torch.testing.assert_close(back.boxes, found.boxes)
    assert torch.equal(back.scores, found.scores)
    assert torch.equal(back.labels, found.labels)
    assert len(Detections.from_coco([], [17, 18, 28], NAMES, (48, 64))) == 0
    with pytest.raises(ValueError, match=r"category ids \[17, 18\] have no name"):
        Detections.from_coco(entries, [1, 2, 3], NAMES, (48, 64))


def test_detections_read_as_text():
    assert repr(detections()) == "Detections(3 in 64x48: dog 0.90, dog 0.50, cat 0.20)"
    assert repr(detections().above(0.95)) == "Detections(0 in 64x48: nothing found)"


def test_above_keeps_what_scores_at_least_as_much():
    assert detections().above(0.5).scores.tolist() == pytest.approx([0.9, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.tensor([0.1, 1.2, 0.3])}, r"scores must lie in \[0, 1\]"),
        ({"scores": torch.tensor([0.1, torch.nan, 0.3])}, r"scores must lie in \[0, 1\]"),
        ({"labels": torch.tensor([0, 3, 1])}, "labels must lie in 0…2"),
        ({"boxes": torch.full((3, 4), torch.inf)}, "NaN or infinite"),
        ({"names": list(NAMES)}, "tuple"),
    ],
)
def test_detections_that_do_not_fit_are_refused(change: dict[str, object], message: str):
    whole = detections()
    columns = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Detections(**(columns | change))
