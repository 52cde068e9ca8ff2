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

from clip_base.checkpoint import read_weights
from clip_base.cli import main_regionclip
from clip_base.errors import InputError
from clip_base.files import read_json, write_json
from clip_base.models.clip import CLIP
from clip_base.weights.native import save_clip
from regionclip import train_rpn as rpn
from regionclip.boxes import iou
from regionclip.detector import Detector, load_detector
from regionclip.structures import RegionBatch, Regions
from regionclip.train_detector import DetectorTask, TrainDetectorConfig, sample_regions

Command = Callable[..., tuple[int, str]]

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


def config(**options: object) -> TrainDetectorConfig:
    return TrainDetectorConfig("a", "i", weights="w", rpn="r", out="o", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def options(world: Path, clip_file: Path, rpn_file: Path) -> list[str]:
    data = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    data += [f"split={world / 'split.json'}", f"weights={clip_file}", f"rpn={rpn_file}"]
    return [*data, "proposals=30", "rois=16", "detector.proposals=20", *TRAINING]


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
    assert bool(after["box_head.bias"].any())


def test_the_file_names_the_base_classes(trained: Path, world: Path) -> None:
    detector, base = load_detector(trained / "model.safetensors")
    assert base == tuple(read_json(world / "split.json")["base"])
    assert detector.config.proposals == 20


def test_the_proposal_network_stays_in_evaluation_mode(make_detector: Callable[..., Detector]) -> None:
    detector = make_detector()
    task = DetectorTask(detector, F.normalize(torch.randn(3, 32), dim=1), config()).train()
    assert detector.network is not None
    assert not detector.network.training
    assert detector.clip.visual.training
    assert not any(parameter.requires_grad for parameter in detector.network.parameters())
    assert not any(parameter.requires_grad for parameter in task.detector.clip.text.parameters())


def proposals_and_truth() -> tuple[Regions, Regions]:
    """40 proposals an image: ten lie on its two boxes, thirty far away from them."""
    truth_boxes = torch.tensor([[0.0, 0, 20, 20], [40, 40, 60, 60]])
    boxes, index = [], []
    for image in range(2):
        near = truth_boxes.repeat(5, 1) + torch.linspace(0, 1, 10)[:, None]
        far = torch.tensor([100.0, 100, 120, 120]) + torch.arange(30)[:, None]
        boxes += [near, far]
        index += [image] * 40
    truth = Regions(truth_boxes.repeat(2, 1), torch.tensor([0, 0, 1, 1]), labels=torch.tensor([0, 1, 2, 3]))
    return Regions(torch.cat(boxes), torch.tensor(index)), truth


def test_regions_are_sampled_in_the_shares_asked_for() -> None:
    proposals, truth = proposals_and_truth()
    regions, targets = sample_regions(proposals, truth, 9, config(rois=16, positive_share=0.25))
    assert len(targets) == len(regions)
    assert regions.labels is not None
    for image in range(2):
        labels = regions.labels[regions.image_index == image]
        assert len(labels) == 16
        assert int((labels != 9).sum()) == 4
        assert set(labels[labels != 9].tolist()) <= {2 * image, 2 * image + 1}


def test_background_fills_up_what_objects_leave() -> None:
    proposals, truth = proposals_and_truth()
    regions, _ = sample_regions(proposals, truth, 9, config(rois=40, positive_share=0.9))
    assert regions.labels is not None
    for image in range(2):
        labels = regions.labels[regions.image_index == image]
        assert int((labels != 9).sum()) == 12  # ten proposals and the two boxes themselves
        assert len(labels) == 40


def test_labels_and_targets_are_those_of_the_box_that_overlaps_most() -> None:
    proposals, truth = proposals_and_truth()
    regions, targets = sample_regions(proposals, truth, 9, config(rois=1000, positive_share=1.0))
    assert regions.labels is not None
    assert truth.labels is not None
    for row in range(len(regions)):
        mine = truth[truth.image_index == regions.image_index[row]]
        overlap = iou(regions.boxes[row : row + 1], mine.boxes)[0]
        best = int(overlap.argmax())
        if overlap[best] >= 0.5:
            assert mine.labels is not None
            assert int(regions.labels[row]) == int(mine.labels[best])
            assert torch.equal(targets[row], mine.boxes[best])
        else:
            assert int(regions.labels[row]) == 9
            assert torch.equal(targets[row], regions.boxes[row])


def test_a_box_of_another_image_is_no_object_here() -> None:
    proposals = Regions(torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([1]))
    truth = Regions(torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([0]), labels=torch.tensor([5]))
    regions, _ = sample_regions(proposals, truth, 9, config(rois=4))
    assert regions.labels is not None
    assert sorted(zip(regions.image_index.tolist(), regions.labels.tolist(), strict=True)) == [(0, 5), (1, 9)]


def test_images_without_boxes_give_background_only() -> None:
    proposals, _ = proposals_and_truth()
    none = Regions(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), labels=torch.zeros(0, dtype=torch.int64)
    )
    regions, _ = sample_regions(proposals, none, 9, config(rois=16))
    assert regions.labels is not None
    assert set(regions.labels.tolist()) == {9}
    assert len(regions) == 32


def test_the_classification_loss_is_the_naive_sum(make_detector: Callable[..., Detector]) -> None:
    task = DetectorTask(
        make_detector(),
        F.normalize(torch.randn(3, 32), dim=1),
        config(background_weight=0.2, focal=0.5),
    )
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 2, 3, 1, 3])
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        share = float(logits[row].softmax(0)[label])
        loss = -((1 - share) ** 0.5) * torch.tensor(share).log().item()
        total += loss * (0.2 if label == 3 else 1.0)
    assert float(task._classification(logits, labels)) == pytest.approx(total / 6, rel=1e-4)


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


def test_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(InputError, match="positive_share=0"):
        config(positive_share=0.0)
    with pytest.raises(InputError, match="rois=0"):
        config(rois=0)


def test_the_losses_are_logged_by_name(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["classification"] > 0 and line["box"] >= 0 for line in lines)
