"""One step of the detector's training: which regions are sampled, and what its losses are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.batch import ImageBatch
from regionclip.models.detector import DELTA_WEIGHTS, Detector
from regionclip.structures.boxes import encode_deltas, iou
from regionclip.structures.regions import RegionBatch, Regions
from regionclip.training import train_detector as training
from regionclip.training.train_detector import DetectorTask, TrainDetectorConfig, sample_regions


def config(**options: object) -> TrainDetectorConfig:
    return TrainDetectorConfig(annotations="a", images="i", weights="w", rpn="r", out="o", **options)  # type: ignore[arg-type]


def proposals_and_truth() -> tuple[Regions, Regions]:
    """40 proposals per image: ten lie on its two boxes, thirty far away from them."""
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
    regions, targets = sample_regions(proposals, truth, 9, config(rois_per_image=16, positive_fraction=0.25))
    assert len(targets) == len(regions)
    assert regions.labels is not None
    for image in range(2):
        labels = regions.labels[regions.image_index == image]
        assert len(labels) == 16
        assert int((labels != 9).sum()) == 4
        assert set(labels[labels != 9].tolist()) <= {2 * image, 2 * image + 1}


def test_background_fills_up_what_objects_leave() -> None:
    proposals, truth = proposals_and_truth()
    regions, _ = sample_regions(proposals, truth, 9, config(rois_per_image=40, positive_fraction=0.9))
    assert regions.labels is not None
    for image in range(2):
        labels = regions.labels[regions.image_index == image]
        assert int((labels != 9).sum()) == 12  # ten proposals and the two boxes themselves
        assert len(labels) == 40


def test_labels_and_targets_are_those_of_the_box_that_overlaps_most() -> None:
    proposals, truth = proposals_and_truth()
    regions, targets = sample_regions(proposals, truth, 9, config(rois_per_image=1000, positive_fraction=1.0))
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
    regions, _ = sample_regions(proposals, truth, 9, config(rois_per_image=4))
    assert regions.labels is not None
    assert sorted(zip(regions.image_index.tolist(), regions.labels.tolist(), strict=True)) == [(0, 5), (1, 9)]


def test_images_without_boxes_give_background_only() -> None:
    proposals, _ = proposals_and_truth()
    none = Regions(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), labels=torch.zeros(0, dtype=torch.int64)
    )
    regions, _ = sample_regions(proposals, none, 9, config(rois_per_image=16))
    assert regions.labels is not None
    assert set(regions.labels.tolist()) == {9}
    assert len(regions) == 32


def naive_classification(logits: Tensor, labels: Tensor, weight: float, focal: float) -> tuple[float, float]:
    """The sum of the weighted losses, and the sum of the weights."""
    total = weights = 0.0
    for row, label in enumerate(labels.tolist()):
        share = float(logits[row].double().softmax(0)[label])
        mine = weight if label == logits.shape[1] - 1 else 1.0
        total -= mine * (1 - share) ** focal * math.log(share)
        weights += mine
    return total, weights


def task_of(detector: Detector, **options: object) -> DetectorTask:
    return DetectorTask(detector, F.normalize(torch.randn(3, 32), dim=1), config(**options))


def classification(task: DetectorTask, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a step's classification loss, and the logits and labels of the regions that it sampled."""
    seen: dict[str, Tensor] = {}
    logits = task.detector.logits

    def watch_logits(*values: Any) -> Tensor:
        seen["logits"] = logits(*values)
        return seen["logits"]

    def watch_labels(*values: Any) -> tuple[Regions, Tensor]:
        regions, targets = sample_regions(*values)
        assert regions.labels is not None
        seen["labels"] = regions.labels
        return regions, targets

    monkeypatch.setattr(task.detector, "logits", watch_logits)
    monkeypatch.setattr(training, "sample_regions", watch_labels)
    boxes, index = torch.tensor([[5.0, 5, 40, 40], [10, 20, 60, 50], [0, 0, 30, 30]]), torch.tensor([0, 0, 1])
    images = ImageBatch.whole(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    loss = task(RegionBatch(images, Regions(boxes, index, labels=torch.tensor([0, 2, 1]))))["classification"]
    assert set(seen["labels"].tolist()) == {0, 1, 2, 3}  # background too
    return loss.detach(), seen["logits"].detach(), seen["labels"]


def test_the_classification_loss_is_the_naive_sum(
    make_detector: Callable[..., Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(make_detector(), background_weight=0.2, focal_gamma=0.5)
    loss, logits, labels = classification(task, monkeypatch)
    total, _ = naive_classification(logits, labels, 0.2, 0.5)
    assert float(loss) == pytest.approx(total / len(labels), rel=1e-4)


def test_without_focal_scaling_the_mean_is_weighted(
    make_detector: Callable[..., Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(make_detector(), background_weight=0.8, focal_gamma=0.0)
    loss, logits, labels = classification(task, monkeypatch)
    total, weights = naive_classification(logits, labels, 0.8, 0.0)
    assert float(loss) == pytest.approx(total / weights, rel=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, weight=torch.tensor([1, 1, 1, 0.8])))


def test_regions_that_are_surely_right_give_finite_gradients() -> None:
    logits = torch.tensor([[90.0, 0, 0, 0], [0, 0, 0, 90], [0, 90, 0, 0]], requires_grad=True)
    training.classification_loss(logits, torch.tensor([0, 3, 2]), config(focal_gamma=0.5)).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert bool(logits.grad[2].abs().sum() > 0)


def test_boxes_are_regressed_by_absolute_differences_of_objects_alone(
    make_detector: Callable[..., Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    proposals, truth = proposals_and_truth()
    detector = make_detector()
    task = task_of(detector, rois_per_image=16, box_weight=2.0)
    sampled: list[tuple[Regions, Tensor]] = []

    def sample(*given: Any) -> tuple[Regions, Tensor]:
        sampled.append(sample_regions(*given))
        return sampled[-1]

    monkeypatch.setattr(training, "sample_regions", sample)
    monkeypatch.setattr(detector, "propose", lambda *_: proposals)
    batch = RegionBatch(ImageBatch.whole(torch.zeros(2, 3, 160, 160)), truth)
    loss = task(batch)["box"]
    (regions, targets) = sampled[0]
    assert regions.labels is not None
    total = 0.0
    for row in (regions.labels < 3).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        _, moves = detector.roi_heads(detector.feature_maps(batch.images), regions[one])
        wanted = encode_deltas(regions.boxes[one], targets[one], DELTA_WEIGHTS)
        assert moves is not None
        total += float((moves - wanted).abs().sum().detach())
    assert float(loss.detach()) == pytest.approx(2 * total / len(regions), rel=1e-3)


def test_a_frozen_tower_leaves_the_box_head_alone_to_be_trained(
    make_detector: Callable[..., Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    proposals, truth = proposals_and_truth()
    detector = make_detector()
    monkeypatch.setattr(detector, "propose", lambda *_: proposals)
    task = task_of(detector, freeze_stages=5, rois_per_image=16).train()
    losses = task(RegionBatch(ImageBatch.whole(torch.randn(2, 3, 160, 160)), truth))
    assert not losses["classification"].requires_grad
    sum(losses.values(), torch.zeros(())).backward()
    moved = {name.split(".")[0] for name, one in detector.named_parameters() if one.grad is not None}
    assert moved == {"box_head"}
