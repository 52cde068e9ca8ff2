"""`max_embedded`: a cheap first score decides which regions the per-region head embeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from clip_base.data.batch import ImageBatch
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.export.detector_graph import DetectorGraph
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig, best_of_each_image, score
from regionclip.structures.regions import ImageInfo, Regions
from regionclip.structures.transforms import ResizeTransform

MakeDetector = Callable[..., Detector]
NAMES = ("cup", "star", "tree")


def ready(detector: Detector) -> Detector:
    rows = torch.randn(len(NAMES), 32, generator=torch.Generator().manual_seed(4))
    detector.set_vocabulary(Vocabulary(NAMES, F.normalize(rows, dim=1)))
    return detector


@pytest.fixture(scope="module")
def images() -> ImageBatch:
    """Two images whose maps have an odd number of rows."""
    generator = torch.Generator().manual_seed(2)
    return ImageBatch.whole(F.interpolate(torch.randn(2, 3, 10, 12, generator=generator), scale_factor=8))


def detected(detector: Detector, images: ImageBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    frames = [ResizeTransform((80, 96), (80, 96))] * 2
    keys = [ImageInfo(slot, 80, 96) for slot in range(2)]
    return [(found.boxes, found.scores) for found in detector.detect_batch(images, frames, keys)]


def test_a_limit_above_the_proposals_changes_nothing(make_detector: MakeDetector, images: ImageBatch) -> None:
    found = [detected(ready(make_detector(max_embedded=limit)), images) for limit in (0, 20)]
    torch.testing.assert_close(found[1], found[0])


def test_only_the_best_are_embedded(make_detector: MakeDetector, images: ImageBatch) -> None:
    detector, every = ready(make_detector(max_embedded=3)), ready(make_detector())
    maps = detector.feature_maps(images)
    regions = detector.propose(maps)
    kept = detector.shortlist(maps, regions, True)
    assert [len(kept.of_image(slot)) for slot in range(2)] == [3, 3]
    with torch.no_grad():
        rough = detector.encoder.rough_embeddings(maps, regions)
        probabilities = detector.logits(rough, detector.classifier, True).softmax(1)[:, : len(NAMES)]
    best = score(regions, probabilities, detector.alpha, "geometric").amax(1)
    for slot in range(2):
        mine = regions.image_index == slot
        wanted = regions.boxes[mine][best[mine].topk(3).indices]
        assert {tuple(box) for box in kept.of_image(slot).boxes.tolist()} == {
            tuple(box) for box in wanted.tolist()
        }
    # What is kept scores as it does among all: the head itself is the same.
    few, all_ = detector.classify(maps, kept, True)[0], every.classify(maps, regions, True)[0]
    rows = [int((regions.boxes == box).all(1).nonzero()[0]) for box in kept.boxes]
    torch.testing.assert_close(few, all_[rows], atol=1e-5, rtol=1e-4)


def test_rows_that_are_not_finite_come_last_and_images_keep_their_own() -> None:
    regions = Regions(torch.zeros(5, 4), torch.tensor([1, 0, 1, 1, 0]))
    scores = torch.tensor([[0.1], [0.2], [torch.nan], [0.05], [0.9]])
    assert best_of_each_image(regions, scores, 2).tolist() == [0, 1, 3, 4]
    assert best_of_each_image(regions, scores, 1).tolist() == [0, 4]
    assert best_of_each_image(regions[:0], scores[:0], 2).tolist() == []


def test_limits_that_do_nothing_are_refused(
    make_clip: Callable[..., CLIP], make_detector: MakeDetector
) -> None:
    with pytest.raises(InputError, match="max_embedded=5 is for region_head=per_region"):
        Detector(make_clip(), DetectorConfig(max_embedded=5), region_head="shared")
    with pytest.raises(InputError, match="max_embedded must be at least 0"):
        DetectorConfig(max_embedded=-1)
    with pytest.raises(InputError, match="a graph embeds every proposal"):
        DetectorGraph(ready(make_detector(max_embedded=5)))
