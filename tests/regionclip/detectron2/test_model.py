"""The same weights do the same in detectron2's model as in ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from clip_base.export.convert import ConvertConfig, convert
from clip_base.models.clip import CLIP
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from regionclip.checkpoints.load import read_detector_file, save_detector
from regionclip.concepts.vocabulary import embed
from regionclip.data.annotations import CocoDetection
from regionclip.data.batches import read_batches, read_record
from regionclip.data.categories import load_split
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.student import FrozenStudent
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.detections import Detections
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.samples import RegionDataset, Sample
from regionclip.training.train_detector import DetectorTask, TrainDetectorConfig

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from regionclip.detectron2.backbone import to_detector
from regionclip.detectron2.mapper import RegionMapper
from regionclip.detectron2.structures import from_instances

RESIZE = TrainingResizeConfig(short=[64], long=64, flip=False)
MakeCfg = Callable[..., Any]


def save(detector: Detector, path: Path) -> Path:
    """Writes a detector whose box head moves boxes by some pixels."""
    torch.manual_seed(3)
    assert isinstance(detector.box_head, torch.nn.Linear)
    torch.nn.init.normal_(detector.box_head.weight, std=0.3)
    save_detector(detector, path, ["cup"])
    return path


@pytest.fixture
def moved_file(make_detector: Callable[..., Detector], tmp_path: Path) -> Path:
    """A detector whose proposal network has a backbone of its own."""
    return save(make_detector(), tmp_path / "detector.safetensors")


@pytest.fixture
def shared_file(make_clip: Callable[..., CLIP], tmp_path: Path) -> Path:
    """A detector whose proposal network stands on its trunk."""
    clip = make_clip()
    assert isinstance(clip.visual, ModifiedResNet)
    torch.manual_seed(1)
    sizes = ProposalNetworkConfig(vision=clip.config.vision, channels=16, share_trunk=True)
    network = ProposalNetwork(sizes, clip.visual).eval()
    detector = Detector.untrained(clip, DetectorConfig(max_proposals=20), network).eval()
    return save(detector, tmp_path / "shared.safetensors")


@pytest.fixture
def student_file(
    make_detector: Callable[..., Detector], make_clip: Callable[..., CLIP], tmp_path: Path
) -> Path:
    """A detector that keeps a student beside it."""
    other = make_clip(seed=5)
    student = FrozenStudent(other.visual, float(other.logit_scale.detach().exp()))
    return save(make_detector().with_student(student).eval(), tmp_path / "student.safetensors")


def ours(file: Path, world: Path, config: DetectorConfig) -> dict[int, Detections]:
    """Returns what our detector finds in the validation scenes, by image id."""
    detector = read_detector_file(file, config)[0]
    dataset = CocoDetection(world / "instances_val.json", world / "images")
    split = load_split(str(world / "split.json"), dataset.categories)
    names, novel = split.all, torch.tensor(split.is_novel(split.all))
    templates = TrainDetectorConfig().templates
    detector.set_vocabulary(
        embed(detector.clip, Tokenizer(detector.clip.config.text.context_length), names, templates, novel)
    )
    found = {}
    groups = read_batches(dataset, read_record, RESIZE, 4, torch.device("cpu"))
    for batch in (batch for group in groups for batch in group.batches):
        detections = detector.detect_batch(batch.images, batch.transforms, batch.infos)
        found |= {record.image_id: one for record, one in zip(batch.items, detections, strict=True)}
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"nms_type": "nms"}, {"fusion": "legacy_logit"}, {"alpha_novel": 0.2, "temperature": 0.02}],
    ids=str,
)
def test_detections_are_those_of_our_detector(
    changes: dict[str, Any], moved_file: Path, world: Path, make_cfg: MakeCfg, settings: dict[str, Any]
) -> None:
    compare(changes, moved_file, world, make_cfg, settings)


def test_detections_on_one_backbone_are_those_of_our_detector(
    shared_file: Path, world: Path, make_cfg: MakeCfg, settings: dict[str, Any]
) -> None:
    compare({}, shared_file, world, make_cfg, settings)


def test_detections_with_a_student_are_those_of_our_detector(
    student_file: Path, world: Path, make_cfg: MakeCfg, settings: dict[str, Any]
) -> None:
    compare({}, student_file, world, make_cfg, settings)


def compare(
    changes: dict[str, Any], file: Path, world: Path, make_cfg: MakeCfg, settings: dict[str, Any]
) -> None:
    """Compares what both find with the options that `changes` names."""
    keys = {f"MODEL.REGIONCLIP.{key.upper()}": value for key, value in changes.items()}
    cfg = make_cfg(file, keys)
    model, mapper = build_model(cfg).eval(), RegionMapper(cfg, False)
    expected = ours(file, world, DetectorConfig(**{**settings, **changes}))
    samples = [mapper(entry) for entry in DatasetCatalog.get("world_all_test")]
    with torch.no_grad():
        outputs = model(samples)
    for sample, output in zip(samples, outputs, strict=True):
        found = from_instances(output["instances"], model.names)
        wanted = expected[sample["image_id"]]
        assert len(found) > 10
        assert found.names == wanted.names
        assert found.labels.equal(wanted.labels)
        torch.testing.assert_close(found.boxes, wanted.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=0)


LOSSES = {
    "loss_cls": "classification",
    "loss_box_reg": "box",
    "loss_rpn_cls": "objectness",
    "loss_rpn_loc": "proposal",
}


@pytest.mark.parametrize(("kind", "losses"), [("moved_file", 2), ("shared_file", 4)])
def test_a_step_has_the_losses_of_our_training(
    kind: str, losses: int, request: pytest.FixtureRequest, world: Path, make_cfg: MakeCfg
) -> None:
    file = request.getfixturevalue(kind)
    cfg = make_cfg(file, {"INPUT.RANDOM_FLIP": "none"})
    model, mapper = build_model(cfg).train(), RegionMapper(cfg, True)
    entries = [entry for entry in DatasetCatalog.get("world_b_train") if entry["annotations"]][:4]
    samples = [mapper(entry) for entry in entries]
    torch.manual_seed(0)
    with EventStorage():
        found = model(samples)

    detector = read_detector_file(file)[0]
    dataset = CocoDetection(world / "instances_train.json", world / "images")
    names = load_split(str(world / "split.json"), dataset.categories).base
    dataset = dataset.restrict(names, keep_empty=False)
    config = TrainDetectorConfig(max_proposals=20, rois_per_image=16)
    tokenizer = Tokenizer(detector.clip.config.text.context_length)
    classifier = embed(detector.clip, tokenizer, names, config.templates).embeddings
    task = DetectorTask(detector, classifier, config).train()
    data = RegionDataset([Sample.of_record(record) for record in dataset[:4]], RESIZE)
    batch = data.collate([data.item(index, torch.Generator()) for index in range(4)])
    torch.manual_seed(0)
    wanted = task(batch)
    assert len(found) == losses
    assert {LOSSES[name] for name in found} == set(wanted)
    for name, loss in found.items():
        torch.testing.assert_close(loss, wanted[LOSSES[name]], atol=1e-4, rtol=1e-4)
    found["loss_cls"].backward()
    assert model.backbone.tower.layer3[0].conv1.weight.grad is not None
    assert model.backbone.tower.layer1[0].conv1.weight.grad is None
    assert model.roi_heads.detector.clip.visual.layer4[0].conv1.weight.grad is not None


def test_blue_first_images_give_the_same_detections(moved_file: Path, make_cfg: MakeCfg) -> None:
    cfg = make_cfg(moved_file)
    sample = RegionMapper(cfg, False)(DatasetCatalog.get("world_all_test")[0])
    swapped = {**sample, "image": sample["image"].flip(0)}
    with torch.no_grad():
        wanted = build_model(cfg).eval()([sample])[0]["instances"]
        found = build_model(make_cfg(moved_file, {"INPUT.FORMAT": "BGR"})).eval()([swapped])[0]["instances"]
    torch.testing.assert_close(found.scores, wanted.scores, atol=0, rtol=0)


def test_a_vocabulary_of_ones_own_replaces_the_test_sets(moved_file: Path, make_cfg: MakeCfg) -> None:
    cfg = make_cfg(moved_file)
    model = build_model(cfg).eval()
    sample = RegionMapper(cfg, False)(DatasetCatalog.get("world_all_test")[0])
    model.set_vocabulary(["red umbrella", "dog"], novel=["dog"])
    with torch.no_grad():
        found = from_instances(model([sample])[0]["instances"], model.names)
    assert found.names == ("red umbrella", "dog")
    assert set(found.labels.tolist()) <= {0, 1}


def test_the_predictor_of_detectron2_takes_it(moved_file: Path, world: Path, make_cfg: MakeCfg) -> None:
    predictor = DefaultPredictor(make_cfg(moved_file))
    predictor.model.set_vocabulary(["cup", "dog"])
    picture = cv2.imread(str(next((world / "images" / "val").iterdir())))
    found = from_instances(predictor(picture)["instances"], predictor.model.names)
    assert found.size == picture.shape[:2]
    assert len(found) > 0


def test_new_weights_are_embedded_anew(moved_file: Path, make_cfg: MakeCfg) -> None:
    model = build_model(make_cfg(moved_file)).eval()
    image = {"image": torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))}

    def scores() -> list[float]:
        with torch.no_grad():
            found: list[float] = model([image])[0]["instances"].scores.tolist()
        return found

    before = scores()
    assert before == scores()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["roi_heads.detector.clip.text.text_projection"] += 1.0
    model.load_state_dict(state)
    assert before != scores()


@pytest.mark.parametrize("kind", ["moved_file", "student_file"])
def test_the_parts_make_our_detector_again(
    kind: str, request: pytest.FixtureRequest, make_cfg: MakeCfg
) -> None:
    file = request.getfixturevalue(kind)
    whole, detector = to_detector(build_model(make_cfg(file))), read_detector_file(file)[0]
    assert whole.base == detector.base == ("cup",)
    assert (whole.student is None) == (detector.student is None) == (kind == "moved_file")
    if whole.student is not None and detector.student is not None:
        assert whole.student.scale == pytest.approx(detector.student.scale)
    wanted, found = detector.state_dict(), whole.state_dict()
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].equal(value), key


def test_a_converted_detector_fills_every_part(moved_file: Path, make_cfg: MakeCfg, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    detector, base = read_detector_file(moved_file)
    for value in detector.parameters():
        value.data += 1.0
    save_detector(detector, other, base)
    convert(ConvertConfig(file=str(other), to="detectron2", out=str(tmp_path / "other.pth")))
    model = build_model(make_cfg(moved_file))
    DetectionCheckpointer(model).load(str(tmp_path / "other.pth"))
    wanted = detector.state_dict()
    for key, value in to_detector(model).state_dict().items():
        assert value.equal(wanted[key]), key


def test_an_rpn_of_detectron2_can_propose_on_the_trunk(clip_file: Path, make_cfg: MakeCfg) -> None:
    changes = {"MODEL.PROPOSAL_GENERATOR.NAME": "RPN", "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32]]}
    cfg = make_cfg(clip_file, changes)
    model, mapper = build_model(cfg).train(), RegionMapper(cfg, True)
    with EventStorage():
        losses = model([mapper(entry) for entry in DatasetCatalog.get("world_b_train")[:2]])
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    with pytest.raises(InputError, match="these are ClipBackbone, RPN, OpenVocabularyROIHeads"):
        to_detector(model)


def test_a_clip_without_proposals_is_told_what_it_lacks(clip_file: Path, make_cfg: MakeCfg) -> None:
    with pytest.raises(InputError, match=r"without a proposal network; set MODEL\.REGIONCLIP\.RPN"):
        build_model(make_cfg(clip_file))


def test_a_zero_shot_model_leaves_boxes_where_they_are_and_cannot_be_trained(
    clip_file: Path, rpn_file: Path, make_cfg: MakeCfg
) -> None:
    changes = {"MODEL.REGIONCLIP.TRAINED": False, "MODEL.REGIONCLIP.RPN": str(rpn_file)}
    cfg = make_cfg(clip_file, changes)
    model, sample = build_model(cfg).eval(), RegionMapper(cfg, False)(DatasetCatalog.get("world_all_test")[0])
    with torch.no_grad():
        found = model([sample])[0]["instances"].pred_boxes.tensor
        images = model.preprocess_image([sample])
        proposals = model.proposal_generator(images, model.backbone(images.tensor))[0][
            0
        ].proposal_boxes.tensor
    scale = sample["width"] / sample["image"].shape[2]
    apart = (found[:, None] - scale * proposals).abs().amax(-1)  # [N, P]
    assert apart.min(1).values.max() < 1e-3
    with pytest.raises(InputError, match="zero-shot"):
        model.train()([RegionMapper(cfg, True)(DatasetCatalog.get("world_b_train")[0])])
