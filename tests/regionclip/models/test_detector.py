"""The detector: boxes lie inside the image, files give back what was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import decode
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.weights.native import save_clip
from regionclip.checkpoints.load import load_detector, read_detector_file, save_detector
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.boxes import iou
from regionclip.structures.detections import Detections
from regionclip.structures.regions import FeatureMaps, ImageInfo, Regions
from regionclip.structures.transforms import (
    ResizeConfig,
    ResizeTransform,
    resize_shortest_edge,
    to_batch,
)

MakeDetector = Callable[..., Detector]
NAMES = ("cup", "star", "tree", "kite")


def vocabulary(width: int = 32, novel: Tensor | None = None) -> Vocabulary:
    generator = torch.Generator().manual_seed(4)
    return Vocabulary(NAMES, F.normalize(torch.randn(4, width, generator=generator), dim=1), novel)


@pytest.fixture(scope="module")
def scene(world: Path) -> tuple[ImageBatch, list[ResizeTransform], list[ImageInfo]]:
    """Two scenes of unlike sizes in one batch, one of them mirrored."""
    files = sorted((world / "images" / "val").glob("*.jpg"))[:2]
    first, second = decode(files[0]), decode(files[1])[:48]
    placed = [resize_shortest_edge(first, 96, 96, flip=True), resize_shortest_edge(second, 64, 96)]
    frames = [frame for _, frame in placed]
    keys = [ImageInfo(slot, *frame.original) for slot, frame in enumerate(frames)]
    return to_batch([pixels for pixels, _ in placed], 32), frames, keys


Scene = tuple[ImageBatch, list[ResizeTransform], list[ImageInfo]]


def detect(detector: Detector, scene: Scene) -> list[Detections]:
    detector.set_vocabulary(vocabulary())
    return detector.detect_batch(*scene)


def test_novel_names_have_an_exponent_of_their_own(make_detector: MakeDetector) -> None:
    detector = make_detector(alpha_base=0.2, alpha_novel=0.7)
    detector.set_vocabulary(vocabulary(novel=torch.tensor([False, True, False, True])))
    assert detector.alpha.tolist() == pytest.approx([0.2, 0.7, 0.2, 0.7])


def test_no_proposal_is_dropped_when_everything_may_stay(make_detector: MakeDetector, scene: Scene) -> None:
    detector = make_detector(min_score=0.0, nms_type="nms", nms=1.0, max_detections=1000, max_proposals=10)
    found = detect(detector, scene)
    regions = detector.propose(detector.feature_maps(scene[0]))
    for slot in range(2):
        assert len(found[slot]) == len(regions.of_image(slot)) * len(NAMES)


@pytest.mark.parametrize("suppression", ["soft", "nms"])
def test_detections_lie_in_the_original_image_best_first(
    make_detector: MakeDetector, scene: Scene, suppression: str
) -> None:
    for found, frame in zip(detect(make_detector(nms_type=suppression), scene), scene[1], strict=True):
        assert len(found)
        height, width = frame.original
        assert found.size == frame.original
        assert bool((found.boxes >= 0).all())
        assert bool((found.boxes[:, 2:] <= torch.tensor([width, height])).all())
        assert bool((found.boxes[:, 2:] > found.boxes[:, :2]).all())
        assert bool((found.scores.diff() <= 0).all())
        assert found.names == NAMES


def test_hard_suppression_leaves_no_overlap_within_a_name(make_detector: MakeDetector, scene: Scene) -> None:
    for found in detect(make_detector(nms_type="nms", nms=0.4), scene):
        for label in range(len(NAMES)):
            boxes = found.boxes[found.labels == label]
            assert float((iou(boxes, boxes) - torch.eye(len(boxes))).clamp(min=0).max()) <= 0.4 + 1e-3


def test_no_more_detections_than_asked_for(make_detector: MakeDetector, scene: Scene) -> None:
    assert [len(found) for found in detect(make_detector(max_detections=7), scene)] == [7, 7]


def test_mirroring_the_frame_mirrors_the_boxes_of_detections(make_clip: Callable[..., CLIP]) -> None:
    detector = Detector(make_clip(), DetectorConfig(min_score=0.0, nms_type="nms"))
    detector.set_vocabulary(vocabulary())

    def given(images: ImageBatch, keys: list[ImageInfo]) -> Regions:
        return Regions(torch.tensor([[0.0, 0, 20, 30]] * 2), torch.tensor([0, 1]), scores=torch.ones(2))

    frames = [ResizeTransform((64, 64), (64, 64), flip) for flip in (False, True)]
    keys = [ImageInfo(0, 64, 64), ImageInfo(1, 64, 64)]
    images = ImageBatch.whole(torch.randn(2, 3, 64, 64))
    plain, mirrored = detector.detect_batch(images, frames, keys, given)
    assert plain.boxes.unique(dim=0).tolist() == [[0, 0, 20, 30]]
    assert mirrored.boxes.unique(dim=0).tolist() == [[44, 0, 64, 30]]


def test_an_image_without_proposals_has_no_detections(make_detector: MakeDetector, scene: Scene) -> None:
    def nothing(images: ImageBatch, keys: list[ImageInfo]) -> Regions:
        return Regions(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))

    detector = make_detector()
    detector.set_vocabulary(vocabulary())
    assert [len(found) for found in detector.detect_batch(*scene, nothing)] == [0, 0]


def test_background_takes_its_share_only_from_trained_detectors(
    make_detector: MakeDetector, scene: Scene
) -> None:
    detector = make_detector()
    detector.set_vocabulary(vocabulary())
    regions = Regions(torch.tensor([[0.0, 0, 50, 60]]), torch.tensor([1]))
    maps = detector.feature_maps(scene[0])
    with_background, _ = detector.classify(maps, regions, background=True)
    without, boxes = detector.classify(maps, regions, background=False)
    assert float(without.sum()) == pytest.approx(1)
    assert float(with_background.sum()) < 1
    share = torch.cat([with_background, 1 - with_background.sum(1, keepdim=True)], 1)
    logits = share.log() - share[:, -1:].log()  # the background's logit is 0
    torch.testing.assert_close(logits[:, :-1].softmax(1), without, atol=1e-4, rtol=1e-3)
    assert boxes.shape == (1, 4)


def test_one_name_is_enough(make_detector: MakeDetector, scene: Scene) -> None:
    detector = make_detector()
    detector.set_vocabulary(vocabulary().subset(["star"]))
    assert set(detector.detect_batch(*scene)[0].labels.tolist()) == {0}


def test_a_saved_detector_finds_the_same(make_detector: MakeDetector, scene: Scene, tmp_path: Path) -> None:
    detector = make_detector(temperature=0.05, alpha_novel=0.3)
    detector.base = ("cup", "star")
    save_detector(detector, tmp_path / "model.safetensors", ["cup", "star"])
    loaded, base = read_detector_file(tmp_path / "model.safetensors")
    assert base == ("cup", "star")
    assert loaded.config == detector.config
    assert not loaded.training
    for one, other in zip(detect(detector, scene), detect(loaded, scene), strict=True):
        torch.testing.assert_close(other.boxes, one.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(other.scores, one.scores, atol=1e-5, rtol=1e-4)
        assert torch.equal(other.labels, one.labels)


def test_other_settings_can_be_given_at_load(make_detector: MakeDetector, tmp_path: Path) -> None:
    save_detector(make_detector(), tmp_path / "model.safetensors", [])
    wanted = DetectorConfig(max_detections=3)
    assert read_detector_file(tmp_path / "model.safetensors", wanted)[0].config == wanted
    assert load_detector(str(tmp_path / "model.safetensors"), wanted).config.max_proposals == 20
    assert (
        load_detector(str(tmp_path / "model.safetensors"), wanted, use_checkpoint_config=False).config
        == wanted
    )


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_file_is_named(detector_file: Path, tmp_path: Path, share: float) -> None:
    cut, whole = tmp_path / "cut.safetensors", detector_file.read_bytes()
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"cut\.safetensors (cannot be read|is an empty file)"):
        read_detector_file(cut)


def test_weights_that_are_no_detector_are_refused(clip_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'clip_base\.clip/1', expected 'regionclip\.detector/1'"):
        read_detector_file(clip_file)
    with pytest.raises(InputError, match="does not exist"):
        read_detector_file(tmp_path / "nowhere.safetensors")


def test_a_size_given_at_load_is_a_clips_and_replaces_a_detectors_only_when_asked(
    make_detector: MakeDetector, clip_file: Path, tmp_path: Path
) -> None:
    file, size = tmp_path / "model.safetensors", ResizeConfig([64], 96)
    save_detector(make_detector(), file, [])
    assert load_detector(str(file), DetectorConfig(), size).resize == ResizeConfig()
    assert load_detector(str(file), None, size, use_checkpoint_config=False).resize == size
    assert load_detector(str(file), None, size, use_checkpoint_config=False).config.max_proposals == 20
    assert load_detector(str(clip_file), DetectorConfig(), size).resize == size


def test_a_detector_is_whole_when_it_is_made(make_clip: Callable[..., CLIP]) -> None:
    clip = make_clip()
    with pytest.raises(ValueError, match="a box head and a background, or neither"):
        Detector(clip, DetectorConfig(), background=torch.nn.Parameter(torch.zeros(32)))
    with pytest.raises(ValueError, match="a box head needs a ResNet tower"):
        Detector.untrained(make_clip("vit"), DetectorConfig())


def test_another_network_leaves_the_rest_of_a_detector_as_it_is(
    make_detector: MakeDetector, make_network: Callable[[], ProposalNetwork]
) -> None:
    detector, network = make_detector(), make_network()
    whole = detector.with_network(network)
    assert whole.network is network
    assert whole.box_head is detector.box_head
    assert whole.background is detector.background
    assert whole.state_dict().keys() == detector.state_dict().keys()


def test_a_clip_is_a_detector_without_training(clip_file: Path) -> None:
    detector = load_detector(str(clip_file), DetectorConfig())
    assert not detector.trained
    assert detector.network is None
    with pytest.raises(ValueError, match="has no proposal network"):
        detector.propose(FeatureMaps(ImageBatch.whole(torch.zeros(1, 3, 64, 64))))


def test_a_vit_detects_by_crops(make_clip: Callable[..., CLIP], scene: Scene, tmp_path: Path) -> None:
    save_clip(make_clip("vit"), tmp_path / "vit.safetensors")
    detector = load_detector(str(tmp_path / "vit.safetensors"), DetectorConfig())
    detector.set_vocabulary(vocabulary())
    regions = Regions(torch.tensor([[0.0, 0, 50, 60], [10, 10, 40, 40]]), torch.tensor([0, 1]))
    found = detector.detect_batch(*scene, lambda images, keys: regions)
    assert all(len(one) for one in found)
    assert found[1].boxes[0].tolist() == pytest.approx([10, 10, 40, 40], rel=0.6)


def test_a_vocabulary_of_another_width_is_refused(make_detector: MakeDetector) -> None:
    with pytest.raises(InputError, match="embeddings of width 48, the model 32"):
        make_detector().set_vocabulary(vocabulary(48))


def test_detecting_without_a_vocabulary_says_so(make_detector: MakeDetector, scene: Scene) -> None:
    with pytest.raises(ValueError, match="call set_vocabulary first"):
        make_detector().detect_batch(*scene)
