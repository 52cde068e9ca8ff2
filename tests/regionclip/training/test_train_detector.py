"""The detector's training: novel boxes never reach it, regions are sampled as asked, what is frozen stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.jobs.cli import main_regionclip
from clip_base.models.clip import CLIP
from clip_base.models.resnet import ModifiedResNet
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, write_json
from clip_base.weights.native import read_weights, save_clip
from regionclip.checkpoints.load import read_detector_file, save_detector
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.models.box_head import EmbeddingBoxes
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.proposals.rpn.config import ProposalHeadConfig
from regionclip.structures.regions import ImageInfo, RegionBatch, Regions
from regionclip.structures.transforms import ResizeTransform
from regionclip.training import train_detector as training
from regionclip.training import train_rpn as rpn
from regionclip.training.train_detector import (
    DetectorTask,
    TrainDetectorConfig,
    proposal_network,
    repeat_factors,
)

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]

TRAINING = [
    "resize.short=[64]",
    "resize.long=64",
    "train.steps=4",
    "train.batch_size=4",
    "train.optimizer=adamw",
    "train.lr=0.001",
    "train.warmup_steps=0",
    "train.schedule=constant",
    "train.precision=fp32",
    "train.log_every=1",
]


def config(network_file: str = "r", **options: object) -> TrainDetectorConfig:
    return TrainDetectorConfig(annotations="a", images="i", weights="w", rpn=network_file, out="o", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def options(world: Path, clip_file: Path, rpn_file: Path) -> list[str]:
    data = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    data += [f"split={world / 'split.json'}", f"weights={clip_file}", f"rpn={rpn_file}"]
    return [*data, "max_proposals=30", "rois_per_image=16", "detector.max_proposals=20", *TRAINING]


@pytest.fixture(scope="module")
def trained(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training") / "out"
    assert main_regionclip(["train-detector", *options, f"out={out}"]) == 0
    return out


class Spy:
    """Notes the boxes and labels that reach a task."""

    def __init__(self) -> None:
        self.boxes: set[tuple[float, ...]] = set()
        self.labels: set[int] = set()

    def __call__(self, regions: Regions) -> None:
        assert regions.labels is not None
        self.boxes |= {tuple(round(side, 2) for side in box) for box in regions.boxes.tolist()}
        self.labels |= set(regions.labels.tolist())


def boxes_of(world: Path, names: list[str]) -> set[tuple[float, ...]]:
    content = read_json(world / "instances_train.json")
    wanted = {entry["id"] for entry in content["categories"] if entry["name"] in names}
    found = set()
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        if entry["category_id"] in wanted:
            found.add(tuple(round(side, 2) for side in (x, y, x + w, y + h)))
    return found


def test_no_box_of_a_novel_class_reaches_the_detectors_training(
    world: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, forward = Spy(), DetectorTask.forward

    def watched(self: DetectorTask, batch: RegionBatch) -> dict[str, Tensor]:
        spy(batch.regions)
        return forward(self, batch)

    monkeypatch.setattr(DetectorTask, "forward", watched)
    assert main_regionclip(["train-detector", *options, "resize.flip=false", f"out={tmp_path / 'out'}"]) == 0
    split = read_json(world / "split.json")
    base, novel = boxes_of(world, split["base"]), boxes_of(world, split["novel"])
    assert novel
    assert spy.boxes <= base
    assert not spy.boxes & (novel - base)
    assert spy.labels <= set(range(len(split["base"])))


def test_no_box_of_a_novel_class_reaches_the_proposal_networks_training(
    world: Path, clip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, forward = Spy(), rpn.RPNTask.forward

    def watched(self: rpn.RPNTask, batch: RegionBatch) -> dict[str, Tensor]:
        spy(batch.regions)
        return forward(self, batch)

    monkeypatch.setattr(rpn.RPNTask, "forward", watched)
    data = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    data += [f"split={world / 'split.json'}", f"network.backbone_weights={clip_file}", "network.channels=16"]
    data += [f"val_annotations={world / 'instances_val.json'}", f"out={tmp_path / 'rpn'}"]
    assert main_regionclip(["train-rpn", *data, *TRAINING, "resize.flip=false"]) == 0
    split = read_json(world / "split.json")
    base, novel = boxes_of(world, split["base"]), boxes_of(world, split["novel"])
    assert spy.boxes
    assert not spy.boxes & (novel - base)
    metrics = read_json(tmp_path / "rpn" / "metrics.json")
    assert 0 <= metrics["recall@100_base"] <= 1
    assert 0 <= metrics["recall@100_novel"] <= 1


def test_only_what_may_move_moves(trained: Path, clip_file: Path, rpn_file: Path) -> None:
    after = read_weights(trained / "model.safetensors")[0]
    for prefix, file in (("clip.", clip_file), ("network.", rpn_file)):
        before = read_weights(file)[0]
        moved = {key for key in before if not torch.equal(before[key], after[f"{prefix}{key}"])}
        allowed = tuple(f"visual.{name}." for name in ("layer2", "layer3", "layer4", "attnpool"))
        assert all(key.startswith(allowed) and "bn" not in key for key in moved), sorted(moved)
        assert bool(moved) == (prefix == "clip.")
    assert bool(after["box_head.moves.bias"].any())


def test_the_file_names_the_base_classes(trained: Path, world: Path) -> None:
    detector, base = read_detector_file(trained / "model.safetensors")
    assert base == tuple(read_json(world / "split.json")["base"])
    assert detector.config.max_proposals == 20


def test_the_proposal_network_stays_in_evaluation_mode(make_detector: Callable[..., Detector]) -> None:
    detector = make_detector()
    task = DetectorTask(detector, F.normalize(torch.randn(3, 32), dim=1), config()).train()
    assert detector.network is not None
    assert not detector.network.training
    assert detector.clip.visual.training
    assert not any(parameter.requires_grad for parameter in detector.network.parameters())
    assert not any(parameter.requires_grad for parameter in task.detector.clip.text.parameters())


def test_repeat_factors_are_those_of_the_rarest_category() -> None:
    images = [torch.tensor(labels, dtype=torch.int64) for labels in ([0, 0, 2], [0], [0, 1], [])]
    factors = repeat_factors([*images, *[images[1]] * 96], 0.04)
    # Categories 1 and 2 are each in 1 of 100 images: sqrt(0.04 / 0.01) = 2; category 0 is in 99.
    assert factors.tolist() == pytest.approx([2, 1, 2, 1] + [1] * 96)
    assert repeat_factors(images, 0.0).tolist() == [1] * 4
    assert repeat_factors([images[3]], 0.5).tolist() == [1]


def test_images_of_rare_categories_are_shown_more_often(
    options: list[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor | None] = []

    def fit_on(data: Any, task: Any, train: Any, run: Any, weights: Tensor | None = None) -> int:
        given.append(weights)
        return 0

    monkeypatch.setattr(training, "fit_on", fit_on)
    monkeypatch.setattr(training, "last_loss", lambda path: None)
    for threshold in (0.0, 1.0):
        out = tmp_path / str(threshold)
        assert (
            main_regionclip(["train-detector", *options, f"repeat_threshold={threshold}", f"out={out}"]) == 0
        )
    plain, repeated = given
    assert plain is None
    assert repeated is not None
    assert len(repeated) == read_json(tmp_path / "1.0" / "metrics.json")["images"]
    assert float(repeated.max()) > 1.5


def test_a_learnt_background_moves_and_a_zero_one_stays(
    options: list[str], trained: Path, tmp_path: Path
) -> None:
    assert not read_weights(trained / "model.safetensors")[0]["background"].any()
    assert (
        main_regionclip(["train-detector", *options, "background_embedding=learned", f"out={tmp_path / 'o'}"])
        == 0
    )
    learned = read_weights(tmp_path / "o" / "model.safetensors")[0]["background"]
    assert float(learned.norm()) > 0
    detector, _ = read_detector_file(tmp_path / "o" / "model.safetensors")
    assert detector.background is not None
    assert torch.equal(detector.background.detach(), learned)
    regions = F.normalize(torch.randn(5, 32), dim=1)
    logits = detector.logits(regions, torch.zeros(0, 32), True)
    torch.testing.assert_close(logits[:, 0].detach(), detector.scale * regions @ learned)


def test_the_published_head_is_trained_and_comes_back(options: list[str], tmp_path: Path) -> None:
    assert main_regionclip(["train-detector", *options, "box_head=embedding", f"out={tmp_path / 'o'}"]) == 0
    detector, _ = read_detector_file(tmp_path / "o" / "model.safetensors")
    assert isinstance(detector.box_head, EmbeddingBoxes)
    images = ImageBatch.whole(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    regions = Regions(torch.tensor([[0.0, 0, 40, 40], [10, 10, 60, 50]]), torch.tensor([0, 0]))
    detector.set_vocabulary(Vocabulary(("cup",), F.normalize(torch.ones(1, 32), dim=1)))
    _, boxes = detector.classify(detector.feature_maps(images), regions, background=True)
    assert boxes.shape == (2, 4)
    assert float((boxes - regions.boxes).abs().min()) > 0


@pytest.fixture(scope="module")
def shared(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector whose proposals come from its own trunk."""
    out = tmp_path_factory.mktemp("shared") / "out"
    others = [option for option in options if not option.startswith("rpn=")]
    assert (
        main_regionclip(["train-detector", *others, "rpn=shared", "network.channels=16", f"out={out}"]) == 0
    )
    return out


def test_on_a_shared_trunk_both_are_trained_and_stored_once(shared: Path, clip_file: Path) -> None:
    lines = [json.loads(line) for line in (shared / "log.jsonl").read_text().splitlines()]
    assert all(line["objectness"] > 0 and line["proposal"] >= 0 for line in lines)
    after, before = read_weights(shared / "model.safetensors")[0], read_weights(clip_file)[0]
    assert not torch.equal(after["clip.visual.layer3.0.conv1.weight"], before["visual.layer3.0.conv1.weight"])
    assert any(key.startswith("network.") for key in after)
    assert not any(key.startswith("network.") and "layer" in key and ".conv" in key for key in after)
    assert torch.equal(after["clip.visual.layer1.0.conv1.weight"], before["visual.layer1.0.conv1.weight"])


def test_the_proposal_loss_reaches_the_shared_trunk(make_clip: Callable[..., CLIP]) -> None:
    task = shared_task(make_clip())
    losses = task(batch_of_two())
    (losses["objectness"] + losses["proposal"]).backward()
    visual = task.detector.clip.visual
    assert isinstance(visual, ModifiedResNet)
    gradient = visual.layer3[0].conv1.weight.grad
    assert gradient is not None
    assert bool(gradient.any())
    assert task.detector.network is not None
    assert all(parameter.grad is not None for parameter in task.detector.network.rpn.parameters())


def shared_task(clip: CLIP) -> DetectorTask:
    sizes = ProposalHeadConfig(channels=16)
    network = proposal_network(config("shared", network=sizes), clip)
    detector = Detector.untrained(clip, DetectorConfig(max_proposals=20), network)
    embeddings = F.normalize(torch.randn(3, 32), dim=1)
    return DetectorTask(detector, embeddings, config(rois_per_image=16, max_proposals=20)).train()


def batch_of_two() -> RegionBatch:
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60], [5, 5, 50, 40]])
    regions = Regions(boxes, torch.tensor([0, 0, 1]), labels=torch.tensor([0, 1, 2]))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return RegionBatch(ImageBatch.whole(images), regions)


def test_a_shared_trunk_runs_once_an_image_in_training_and_detection(
    make_clip: Callable[..., CLIP], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    stages = ModifiedResNet.stages

    def counted(self: ModifiedResNet, images: Tensor) -> list[Tensor]:
        calls.append(len(images))
        return stages(self, images)

    monkeypatch.setattr(ModifiedResNet, "stages", counted)
    task, batch = shared_task(make_clip()), batch_of_two()
    task(batch)
    assert calls == [2]
    detector = task.detector.eval()
    detector.set_vocabulary(Vocabulary(("cup",), F.normalize(torch.ones(1, 32), dim=1)))
    frames, keys = [ResizeTransform((64, 64), (64, 64))] * 2, [ImageInfo(0, 64, 64), ImageInfo(1, 64, 64)]
    assert len(detector.detect_batch(batch.images, frames, keys)) == 2
    assert calls == [2, 2]


def test_a_shared_detector_finds_the_same_when_it_is_read_again(shared: Path, tmp_path: Path) -> None:
    detector, base = read_detector_file(shared / "model.safetensors")
    assert detector.shares_trunk
    save_detector(detector, tmp_path / "again.safetensors", base)
    again, _ = read_detector_file(tmp_path / "again.safetensors")
    images = batch_of_two().images
    found, wanted = (one.propose(one.feature_maps(images)) for one in (again, detector))
    torch.testing.assert_close(found.boxes, wanted.boxes)


def test_a_vit_is_refused(
    options: list[str], make_clip: Callable[..., CLIP], tmp_path: Path, regionclip: Command
) -> None:
    save_clip(make_clip("vit"), tmp_path / "vit.safetensors")
    others = [option for option in options if not option.startswith("weights=")]
    code, told = regionclip(
        "train-detector", *others, f"weights={tmp_path / 'vit.safetensors'}", f"out={tmp_path / 'out'}"
    )
    assert code == 2
    assert "is a ViT" in told


def test_a_split_without_base_boxes_says_so(
    world: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    content: dict[str, Any] = read_json(world / "instances_train.json")
    write_json(tmp_path / "none.json", {**content, "annotations": []})
    others = [option for option in options if not option.startswith("annotations=")]
    code, told = regionclip(
        "train-detector", *others, f"annotations={tmp_path / 'none.json'}", f"out={tmp_path / 'out'}"
    )
    assert code == 2
    assert "nothing to train on" in told


def test_images_without_any_box_train_the_background_alone(
    world: Path, options: list[str], swapped: Swap, tmp_path: Path, regionclip: Command
) -> None:
    content: dict[str, Any] = read_json(world / "instances_train.json")
    write_json(tmp_path / "none.json", {**content, "annotations": []})
    out = tmp_path / "out"
    given = swapped(options, annotations=tmp_path / "none.json", keep_empty=True, repeat_threshold=0.5)
    assert regionclip("train-detector", *given, f"out={out}")[0] == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line["box"] == 0 and line["classification"] > 0 for line in lines)


def test_a_loss_that_is_not_a_number_names_the_step_and_the_images(
    options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    out = tmp_path / "out"
    code, told = regionclip("train-detector", *options, "box_weight=.nan", f"out={out}")
    assert code == 2
    assert "the loss is not finite at step 1" in told
    assert "box nan" in told
    assert len(read_json(out / "not_finite.json")["samples"]) == 4
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("base", "told"),
    [(["cup", "no such thing"], "no such thing"), (["cup", "cup"], "cup")],
    ids=["a name that the annotations lack", "a name twice"],
)
def test_a_split_that_does_not_fit_is_refused(
    options: list[str], swapped: Swap, tmp_path: Path, regionclip: Command, base: list[str], told: str
) -> None:
    write_json(tmp_path / "split.json", {"base": base, "novel": []})
    code, error = regionclip(
        "train-detector", *swapped(options, split=tmp_path / "split.json"), f"out={tmp_path / 'out'}"
    )
    assert code == 2
    assert told in error
    assert error.count("\n") == 1


def test_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(InputError, match="positive_fraction=0"):
        config(positive_fraction=0.0)
    with pytest.raises(InputError, match="rois_per_image=0"):
        config(rois_per_image=0)


def test_the_losses_are_logged_by_name(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["classification"] > 0 and line["box"] >= 0 for line in lines)
