"""RegionCLIP's published files: every tensor has its purpose, our jobs take them, and they convert both ways.

The files are drawn here, with the names and shapes that the released code gives them and a small tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.export.convert import ConvertConfig, convert
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.inspect import InspectConfig, inspect
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip
from clip_base.weights.reading import read_clip
from regionclip.checkpoints.convert import part_of
from regionclip.checkpoints.load import (
    RESIZE,
    SETTINGS,
    load_detector,
    read_detector_file,
    save_detector,
    vocabulary_for,
)
from regionclip.data.annotations import CocoDetection
from regionclip.data.categories import parse_names
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.precomputed import TruthProposer
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.detectron2_names import from_detectron2, to_detectron2
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import RPNConfig, RPNProposer, load_network, save_network
from regionclip.structures.regions import ImageInfo

State = dict[str, Tensor]
BOX = "roi_heads.box_predictor."
COCO65 = [name for name in parse_names("coco") if name in set(parse_names("coco65"))]


def save(state: State, path: Path) -> Path:
    """Writes a checkpoint as fvcore does, with what training leaves in it."""
    training = {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "iteration": 7}
    torch.save({"model": state, **training}, path)
    return path


def tower(model: CLIP) -> State:
    state = model.visual.state_dict()
    return {f"backbone.{name}": value for name, value in state.items() if "num_batches" not in name}


def words(model: CLIP) -> State:
    return {f"lang_encoder.{name}": value for name, value in model.text.state_dict().items()}


def head(width: int, trained: int = 48, found: int = 65) -> State:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "cls_score.weight": (trained, width),
        "test_cls_score.weight": (found, width),
        "bbox_pred.weight": (4, width),
        "bbox_pred.bias": (4,),
    }
    drawn = {f"{BOX}{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, f"{BOX}cls_bg_score.weight": torch.zeros(1, width)}


@pytest.fixture(scope="module")
def network() -> ProposalNetwork:
    """A proposal network as rpn_coco_48's, untrained."""
    torch.manual_seed(0)
    sizes = ProposalNetworkConfig(
        backbone="resnet50", stride_in_1x1=True, pixels="caffe", frozen_stages=2, frozen_batch_norm=True,
        design="c4", strides=[16], anchor_sizes=[32.0, 64.0, 128.0, 256.0, 512.0], ratios=[0.5, 1.0, 2.0],
        pre_nms=6000, merge_levels=False, min_size=0.0,
    )  # fmt: skip
    return ProposalNetwork(sizes).eval()


@pytest.fixture(scope="module")
def rpn_file(network: ProposalNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as detectron2 saves the Mask R-CNN that it was trained in."""
    second = {
        "roi_heads.res5.0.conv1.weight": torch.ones(2, 2),
        "roi_heads.mask_head.deconv.bias": torch.ones(2),
    }
    folder = tmp_path_factory.mktemp("rpn")
    return save({**to_detectron2(network), **second}, folder / "rpn_coco_48.pth")


@pytest.fixture(scope="module")
def model() -> CLIP:
    """A small CLIP with heads of 64 channels, as the published ones have and the files do not say."""
    torch.manual_seed(0)
    vision = VisionConfig(layers=[1, 1, 1, 1], width=8, resolution=64)
    made = CLIP(CLIPConfig(32, vision, TextConfig(width=32, heads=1, layers=1, context_length=24))).eval()
    for part in made.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1)
            torch.nn.init.normal_(part.running_mean, std=0.1)
    return made


@pytest.fixture(scope="module")
def own_file(model: CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "clip.safetensors"
    save_clip(model, path)
    return path


@pytest.fixture(scope="module")
def finetuned(model: CLIP, network: ProposalNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    offline = {f"offline_{name}": value for name, value in to_detectron2(network).items()}
    masks = {"roi_heads.mask_head.predictor.weight": torch.ones(2, 2)}
    folder = tmp_path_factory.mktemp("finetuned")
    path = folder / "regionclip_finetuned-coco_rn50.pth"
    return save({**tower(model), **head(model.config.embed_dim), **offline, **masks}, path)


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    inspect(InspectConfig(file=str(path)))
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_pretrained_file_is_a_clip_and_the_rest_is_named(
    model: CLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {f"teacher_{name}": value for name, value in tower(model).items()}
    pools = {"concept_emb": torch.randn(5, 32), "teacher_concept_emb": torch.randn(5, 32)}
    path = save(
        {**tower(model), **words(model), **teacher, **pools}, tmp_path / "regionclip_pretrained-cc_rn50.pth"
    )
    found, report = read_clip(path)
    pixels, tokens = torch.randn(2, 3, 64, 64), torch.randint(1, 400, (2, 24))
    torch.testing.assert_close(found.encode_image(pixels), model.encode_image(pixels))
    torch.testing.assert_close(found.encode_text(tokens), model.encode_text(tokens))
    assert math.isclose(float(found.logit_scale.detach()), math.log(100), rel_tol=1e-6)
    assert report.form == "a pretrained RegionCLIP"
    assert any(note.startswith("not needed: teacher") for note in report.notes)
    assert any(note.startswith("not needed: pools (2 tensors)") for note in report.notes)
    text = shown(path, capsys)
    assert "teacher (not needed)" in text
    assert "it has the name of regionclip_pretrained-cc_rn50" in text


def test_a_tensor_that_nobody_knows_is_an_error(model: CLIP, tmp_path: Path) -> None:
    path = save(
        {**tower(model), **words(model), "roi_heads.keypoint.weight": torch.ones(3)}, tmp_path / "a.pth"
    )
    with pytest.raises(
        InputError, match=r"1 of its \d+ tensors are unknown: roi_heads\.keypoint\.weight \[3\]"
    ):
        load_clip(path)
    state = {**tower(model), **words(model)}
    del state["backbone.layer2.0.conv1.weight"]
    with pytest.raises(InputError, match=r"1 missing: visual\.layer2\.0\.conv1\.weight"):
        load_clip(save(state, tmp_path / "b.pth"))


def test_openais_towers_for_student_and_teacher_are_read(model: CLIP, tmp_path: Path) -> None:
    visual = {f"visual.{name.removeprefix('backbone.')}": value for name, value in tower(model).items()}
    text = {name.removeprefix("lang_encoder."): value for name, value in words(model).items()}
    teacher = {f"teacher_{name}": value for name, value in visual.items()}
    logit = {"logit_scale": torch.tensor(4.0)}
    path = save({**visual, **text, **logit, **teacher}, tmp_path / "teacher_RN50_student_RN50_OAI_CLIP.pth")
    found = load_clip(path)
    assert float(found.logit_scale.detach()) == 4
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(found.encode_image(pixels), model.encode_image(pixels))


def test_a_finetuned_file_is_a_detector_that_scores_as_its_authors_tested_it(
    model: CLIP, finetuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = load_detector(str(finetuned), DetectorConfig())
    assert detector.class_embeddings is not None
    assert detector.trained
    assert not detector.training
    given = head(model.config.embed_dim)
    assert isinstance(detector.box_head, torch.nn.Linear)
    torch.testing.assert_close(detector.box_head.weight.detach(), given[f"{BOX}bbox_pred.weight"])
    assert detector.background is not None
    assert not detector.background.any()
    assert (detector.config, detector.resize) == (SETTINGS[48], RESIZE)
    assert detector.scale == 100
    other = DetectorConfig(max_detections=7)
    assert load_detector(str(finetuned), other, use_checkpoint_config=False).config == other
    text = shown(finetuned, capsys)
    for part in (
        "a RegionCLIP detector",
        "mask head (not needed)",
        "proposal network",
        "class embeddings",
        "whole",
    ):
        assert part in text


def test_what_no_published_detector_has_is_said(model: CLIP, tmp_path: Path) -> None:
    width = model.config.embed_dim
    state = {**tower(model), **head(width, trained=12)}
    with pytest.raises(InputError, match="trained on 12 names, which is not one of the published"):
        load_detector(str(save(state, tmp_path / "a.pth")), DetectorConfig())
    state[f"{BOX}bbox_pred.weight"] = torch.randn(48, width)
    with pytest.raises(InputError, match="for each class"):
        load_detector(str(save(state, tmp_path / "b.pth")), DetectorConfig(), use_checkpoint_config=False)
    del state[f"{BOX}cls_bg_score.weight"]
    with pytest.raises(InputError, match="cls_bg_score"):
        load_detector(str(save(state, tmp_path / "c.pth")), DetectorConfig(), use_checkpoint_config=False)


def test_names_are_embedded_by_the_file_then_by_a_text_tower_that_is_given(
    model: CLIP, finetuned: Path, clip_file: Path, make_clip: Callable[..., CLIP], tmp_path: Path
) -> None:
    detector = load_detector(str(finetuned), DetectorConfig())
    asked = ["dog", "person"]
    found = vocabulary_for(detector, asked, COCO65, ["{}"], torch.tensor([True, False]))
    rows = torch.nn.functional.normalize(head(32)[f"{BOX}test_cls_score.weight"], dim=1)
    torch.testing.assert_close(found.embeddings, rows[[COCO65.index(name) for name in asked]])
    assert found.novel is not None
    assert found.novel.tolist() == [True, False]
    with pytest.raises(InputError, match="give text_weights=FILE"):
        vocabulary_for(detector, ["sloth"], ["sloth"], ["{}"])
    worded = load_detector(str(finetuned), DetectorConfig(), text_weights=str(clip_file))
    sloth = vocabulary_for(worded, ["sloth"], ["sloth"], ["{}"])
    mine = vocabulary_for(Detector(model, DetectorConfig()), ["sloth"], ["sloth"], ["{}"])
    torch.testing.assert_close(sloth.embeddings, mine.embeddings)
    save_clip(make_clip(embed_dim=16), tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match="embeds names in 16 numbers"):
        load_detector(str(finetuned), DetectorConfig(), text_weights=str(tmp_path / "narrow.safetensors"))
    with pytest.raises(InputError, match="already has a text tower"):
        load_detector(str(clip_file), DetectorConfig(), text_weights=str(clip_file))


def test_the_detect_job_takes_a_finetuned_file_alone(
    finetuned: Path, world: Path, tmp_path: Path, regionclip: Callable[..., tuple[int, str]]
) -> None:
    photo = min((world / "images").iterdir())
    sizes = ("use_checkpoint_config=false", "resize.short=[64]", "resize.long=64", "detector.min_score=0.0")
    names = f"vocabulary={', '.join(COCO65[:3])}"
    given = (photo, f"weights={finetuned}", names, f"out={tmp_path / 'seen'}", "precision=fp32", *sizes)
    code, told = regionclip("detect", *given)
    assert code == 0, told
    found = read_json(tmp_path / "seen" / "detections.json")
    assert {entry["category_name"] for entry in found} <= set(COCO65[:3])
    assert found
    code, told = regionclip("detect", *given[:2], "vocabulary=sloth", *given[3:])
    assert code == 2
    assert "these weights have no text tower to embed names: give text_weights=FILE" in told


def test_true_boxes_can_take_the_place_of_proposals(world: Path) -> None:
    records = list(CocoDetection(world / "instances_val.json", world / "images"))
    images = ImageBatch.whole(torch.zeros(2, 3, 32, 64))
    keys = [ImageInfo(record.image_id, 64, 64) for record in records[:2]]
    found = TruthProposer(records)(images, keys)
    wanted = torch.cat([record.without_crowds().boxes for record in records[:2]])
    torch.testing.assert_close(found.boxes, wanted * torch.tensor([1, 0.5, 1, 0.5]))
    assert found.scores is not None
    assert found.scores.eq(1).all()
    assert len(found) > 0


def test_class_embeddings_go_by_the_datas_category_order(
    model: CLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = Detector(model, DetectorConfig())
    torch.save(torch.eye(65, 32) + torch.ones(65, 32), tmp_path / "coco_65_cls_emb.pth")
    asked = parse_names("coco65")  # base names first, the file has category order
    coco = vocabulary_for(detector, asked, asked, [], None, str(tmp_path / "coco_65_cls_emb.pth"))
    assert coco.embeddings[asked.index("airplane")].argmax() == COCO65.index("airplane")
    rows = torch.randn(3, 32)
    torch.save(rows, tmp_path / "three.pth")
    found = vocabulary_for(detector, ["c", "a"], ["a", "b", "c"], [], None, str(tmp_path / "three.pth"))
    torch.testing.assert_close(found.embeddings, torch.nn.functional.normalize(rows, dim=1)[[2, 0]])
    with pytest.raises(InputError, match="has 3 embeddings: the data have 4 categories"):
        vocabulary_for(detector, ["c", "a"], ["a", "b", "c", "d"], [], None, str(tmp_path / "three.pth"))
    assert "concept embeddings" in shown(tmp_path / "three.pth", capsys)
    with pytest.raises(InputError, match="holds concept embeddings, not a CLIP"):
        load_clip(tmp_path / "three.pth")


def test_an_rpn_file_serves_as_a_proposer(
    network: ProposalNetwork, rpn_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_network(rpn_file)
    assert found.config == from_detectron2(to_detectron2(network))[0]
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    assert RPNProposer(RPNConfig(weights=str(rpn_file), limit=1000)).network.config == found.config
    assert "second stage (not needed)" in shown(rpn_file, capsys)
    with pytest.raises(InputError, match="which has no complete CLIP"):
        load_clip(rpn_file)


def to(form: str, file: Path, out: Path, **options: Any) -> Path:
    convert(ConvertConfig(file=str(file), out=str(out), to=form, **options))
    return out


def assert_equal(found: State, wanted: State) -> None:
    kept = {name for name in wanted if not name.endswith("num_batches_tracked")}
    assert {name for name in found if not name.endswith("num_batches_tracked")} == kept
    for name in kept:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)


def test_a_clip_goes_to_regionclips_form_and_back(model: CLIP, own_file: Path, tmp_path: Path) -> None:
    path = to("regionclip", own_file, tmp_path / "r.pth")
    assert_equal(load_clip(path).state_dict(), model.state_dict())
    assert_equal(load_clip(to("native", path, tmp_path / "n.safetensors")).state_dict(), model.state_dict())
    held = torch.load(path, weights_only=True)["model"]
    assert set(tower(model)) | set(words(model)) | {"lang_encoder.logit_scale"} == set(held)


def test_what_regionclips_form_has_no_place_for_is_refused(
    make_clip: Callable[..., CLIP], clip_file: Path, own_file: Path, tmp_path: Path
) -> None:
    save_clip(make_clip("vit"), tmp_path / "vit.safetensors")
    with pytest.raises(InputError, match="RegionCLIP's towers are ResNets"):
        to("regionclip", tmp_path / "vit.safetensors", tmp_path / "r.pth")
    with pytest.raises(InputError, match=r"read \.pth"):
        to("regionclip", own_file, tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="heads of 32 channels"):
        to("regionclip", clip_file, tmp_path / "r.pth")
    with pytest.raises(InputError, match="is for to=native"):
        to("regionclip", own_file, tmp_path / "r.pth", text_weights=str(clip_file))


def test_a_detector_goes_to_regionclips_form_and_back(
    model: CLIP, network: ProposalNetwork, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    detector = Detector.untrained(model, SETTINGS[48], network).eval()
    assert detector.background is not None
    torch.nn.init.normal_(detector.background)
    save_detector(detector, tmp_path / "ours.safetensors", parse_names("coco_base"))
    path = to("regionclip", tmp_path / "ours.safetensors", tmp_path / "theirs.pth")
    again = to("native", path, tmp_path / "again.safetensors")
    found, base = read_detector_file(again)
    assert_equal(found.state_dict(), detector.state_dict())
    assert (base, found.config) == (tuple(parse_names("coco_base")), SETTINGS[48])


def test_a_finetuned_file_becomes_ours_with_a_text_tower(
    finetuned: Path, clip_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="give text_weights=FILE"):
        to("native", finetuned, tmp_path / "d.safetensors")
    path = to("native", finetuned, tmp_path / "d.safetensors", text_weights=str(clip_file))
    detector, base = read_detector_file(path)
    theirs = load_detector(str(finetuned), DetectorConfig(), text_weights=str(clip_file))
    assert_equal(detector.state_dict(), theirs.state_dict())
    assert (detector.resize, base) == (RESIZE, tuple(parse_names("coco_base")))


def test_a_network_goes_to_detectron2_and_regionclip_and_back(
    network: ProposalNetwork, tmp_path: Path
) -> None:
    save_network(network, tmp_path / "ours.safetensors")
    for form in ("detectron2", "regionclip"):
        path = to(form, tmp_path / "ours.safetensors", tmp_path / f"{form}.pth")
        assert_equal(torch.load(path, weights_only=True)["model"], to_detectron2(network))
        back = to("native", path, tmp_path / f"{form}.safetensors")
        assert_equal(load_network(back).state_dict(), network.state_dict())
        assert load_network(back).config == load_network(path).config


def test_a_detector_goes_to_detectron2s_parts(detector_file: Path, clip_file: Path, tmp_path: Path) -> None:
    held = torch.load(to("detectron2", detector_file, tmp_path / "d.pth"), weights_only=True)["model"]
    whole = read_detector_file(detector_file)[0].state_dict()
    assert_equal(held, {part_of(name): value for name, value in whole.items()})
    assert "backbone.tower.layer3.0.conv1.weight" in held
    assert "roi_heads.detector.clip.visual.layer4.0.conv1.weight" in held
    with pytest.raises(InputError, match="detectron2's format is for proposal networks"):
        to("detectron2", clip_file, tmp_path / "c.pth")
