"""What a detector's training keeps of names without boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.jobs.cli import main_regionclip
from clip_base.jobs.run import RunFolder
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, write_json
from clip_base.training.loop import TrainConfig
from clip_base.weights.native import read_weights
from regionclip.checkpoints.load import read_detector_file
from regionclip.data.annotations import CocoDetection
from regionclip.models.detector import Detector
from regionclip.structures.regions import RegionBatch, Regions
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.keep import StartingEmbeddings, keeps_student, named_right, with_pseudo_labels
from regionclip.training.samples import RegionDataset, Sample
from regionclip.training.train_detector import (
    DetectorTask,
    TrainDetectorConfig,
    classification_loss,
    sample_regions,
)

Command = Callable[..., tuple[int, str]]


def config(**options: object) -> TrainDetectorConfig:
    return TrainDetectorConfig(annotations="a", images="i", weights="w", rpn="r", out="o", **options)  # type: ignore[arg-type]


def truth() -> Regions:
    return Regions(torch.tensor([[0.0, 0, 30, 30]]), torch.tensor([0]), labels=torch.tensor([1]))


def test_proposals_that_look_like_objects_are_no_background() -> None:
    boxes = torch.tensor([[0.0, 0, 30, 31], [40, 40, 60, 60], [35, 0, 60, 20]])
    proposals = Regions(boxes, torch.zeros(3, dtype=torch.int64), scores=torch.tensor([0.9, 0.7, 0.2]))
    for gate, expected in ((0.0, [1, 1, 9, 9]), (0.5, [1, 1, 9]), (0.2, [1, 1])):
        found, _ = sample_regions(proposals, truth(), 9, config(background_gate=gate, positive_fraction=1.0))
        assert found.labels is not None
        assert sorted(found.labels.tolist()) == expected
    assert [0.0, 0, 30, 31] in found.boxes.tolist()  # an object is one at any objectness


def test_proposals_outside_base_boxes_keep_their_embeddings(make_detector: Callable[..., Detector]) -> None:
    detector = make_detector()
    detector.requires_grad_(False)
    images = ImageBatch.whole(torch.randn(2, 3, 64, 64))
    boxes = torch.tensor([[0.0, 0, 30, 31], [20, 20, 60, 60], [10, 30, 50, 60]])
    proposals = Regions(boxes, torch.tensor([0, 0, 1]))
    starting = StartingEmbeddings(detector, 5)
    maps = detector.feature_maps(images)
    assert float(starting.loss(detector, maps, proposals, truth())) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        detector.clip.visual.attnpool.c_proj.weight.neg_()  # type: ignore[union-attr, operator]
        detector.clip.visual.attnpool.c_proj.bias.neg_()  # type: ignore[union-attr, operator]
    maps = detector.feature_maps(images)
    assert float(starting.loss(detector, maps, proposals, truth())) == pytest.approx(2, abs=1e-5)
    assert len(starting._sampled(proposals, truth())) == 2  # the first lies on a base box
    assert len(StartingEmbeddings(detector, 1)._sampled(proposals, truth())) == 2  # one of each image


def test_the_distance_is_a_loss_that_moves_the_tower_back(make_detector: Callable[..., Detector]) -> None:
    torch.manual_seed(0)
    detector = make_detector()
    names = F.normalize(torch.randn(3, 32), dim=1)
    task = DetectorTask(detector, names, config(proposal_distillation=2.0, freeze_stages=0)).train()
    assert not any(name.startswith("starting") for name, _ in task.named_parameters())
    batch = RegionBatch(ImageBatch.whole(torch.randn(1, 3, 64, 64)), truth())
    losses = task(batch)
    assert set(losses) == {"classification", "box", "proposal_distillation"}
    assert float(losses["proposal_distillation"].detach()) == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        detector.clip.visual.attnpool.c_proj.weight.mul_(torch.randn(32, 1))  # type: ignore[union-attr, operator]
    moved = task(batch)["proposal_distillation"]
    assert float(moved.detach()) > 0.05
    moved.backward()
    assert detector.clip.visual.conv1.weight.grad is not None


def test_mined_boxes_count_as_they_are_weighted_and_move_no_box(
    make_detector: Callable[..., Detector],
) -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 4])  # a base name, a mined one, background
    alone = [
        float(classification_loss(logits[row : row + 1], labels[row : row + 1], config())) for row in range(3)
    ]
    found = float(classification_loss(logits, labels, config(pseudo_weight=0.25), base=2))
    assert found == pytest.approx((alone[0] + 0.25 * alone[1] + alone[2]) / 3, rel=1e-5)
    boxes = []
    for base in (2, 1):  # the box of name 1 is a base box, then a mined one
        torch.manual_seed(0)
        task = DetectorTask(make_detector(), F.normalize(torch.randn(2, 32), dim=1), config(), base)
        batch = RegionBatch(ImageBatch.whole(torch.randn(1, 3, 64, 64)), truth())
        boxes.append(float(task(batch)["box"].detach()))
    assert boxes[0] > 0
    assert boxes[1] == 0


def test_a_classifier_that_is_given_later_is_of_base_names(make_detector: Callable[..., Detector]) -> None:
    task = DetectorTask(make_detector(), torch.zeros(0, 32), config())
    task.classifier = F.normalize(torch.randn(2, 32), dim=1)
    batch = RegionBatch(ImageBatch.whole(torch.randn(1, 3, 64, 64)), truth())
    assert float(task(batch)["box"].detach()) > 0


def test_mined_boxes_on_base_boxes_are_left_out(world: Path, tmp_path: Path) -> None:
    split = read_json(world / "split.json")
    everything = CocoDetection(world / "instances_train.json", world / "images")
    records = list(everything.restrict(split["base"], keep_empty=True))
    merged, names = with_pseudo_labels(records, everything, split["base"])
    assert set(names) == set(everything.categories) - set(split["base"])
    added = sum(len(after.boxes) - len(before.boxes) for before, after in zip(records, merged, strict=True))
    novel = sum(len(record.boxes) for record in everything.restrict(names, keep_empty=False))
    assert 0 < added <= novel
    for before, after in zip(records, merged, strict=True):
        assert torch.equal(after.boxes[: len(before.boxes)], before.boxes)
        assert (after.labels[len(before.boxes) :] >= len(split["base"])).all()
    shifted = [replace(record, boxes=record.boxes + 1) for record in everything]  # of the same objects
    everything._records = [
        replace(record, labels=torch.full_like(record.labels, everything.categories.index(names[0])))
        for record in shifted
    ]
    whole = list(CocoDetection(world / "instances_train.json", world / "images"))
    with pytest.raises(InputError, match="none of their boxes"):
        with_pseudo_labels(whole, everything, split["base"])
    with pytest.raises(InputError, match="none of their boxes"):
        with_pseudo_labels(records, everything.restrict(split["base"]), split["base"])


def test_a_detector_learns_of_mined_boxes_and_its_file_names_base_classes_alone(
    world: Path, clip_file: Path, rpn_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content: dict[str, Any] = read_json(world / "instances_train.json")
    pseudo = tmp_path / "pseudo.json"
    write_json(pseudo, content)
    options = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    options += [f"split={world / 'split.json'}", f"weights={clip_file}", f"rpn={rpn_file}", "train.steps=1"]
    options += ["resize.short=[64]", "resize.long=64", "train.batch_size=2", "train.warmup_steps=0"]
    options += ["max_proposals=8", "rois_per_image=8", "proposal_distillation=1", "background_gate=0.9"]
    out = tmp_path / "out"
    assert main_regionclip(["train-detector", *options, f"pseudo_labels={pseudo}", f"out={out}"]) == 0
    assert "mined boxes of" in capfd.readouterr().out
    base = read_json(world / "split.json")["base"]
    assert read_detector_file(out / "model.safetensors")[1] == tuple(base)
    assert "pseudo_labels" in json.loads((out / ".inputs.json").read_text())


@pytest.mark.parametrize(
    ("share", "refit", "rpn"),
    [("0.0", "0.5", ""), ("0.25", "0", ""), ("0.25", "0.5", ""), ("0.5", "1", "shared")],
)
def test_finished_weights_lie_between_the_first_and_the_last(
    world: Path, clip_file: Path, rpn_file: Path, tmp_path: Path, share: str, refit: str, rpn: str
) -> None:
    options = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    options += [f"split={world / 'split.json'}", f"weights={clip_file}", f"rpn={rpn or rpn_file}"]
    options += ["resize.short=[64]", "resize.long=64", "train.batch_size=2", "train.warmup_steps=0"]
    options += ["max_proposals=8", "rois_per_image=8", "train.lr=0.01", "freeze_batch_norm=false"]
    options += ["train.steps=2", "network.channels=16", f"starting_share={share}", f"refit={refit}"]
    options += ["keep_student=never"]
    out = tmp_path / "out"
    assert main_regionclip(["train-detector", *options, f"out={out}"]) == 0
    last = read_weights(out / "checkpoints" / "00000002" / "model.safetensors")[0]
    found, start = read_weights(out / "model.safetensors")[0], read_weights(clip_file)[0]
    refitted = round(2 * float(refit)) if float(share) else 0
    assert (out / "heads" / "log.jsonl").exists() == bool(refitted)
    moved = refit_moved = 0
    for name, value in found.items():
        ended = last[f"detector.{name}"]
        begun = start[name.removeprefix("clip.")] if name.startswith("clip.visual.") else ended
        moved += int(not torch.equal(begun, ended))
        wanted = float(share) * begun.double() + (1 - float(share)) * ended.double()
        if refitted and name.startswith(("box_head.", *(["network."] if rpn else []))):
            refit_moved += int(not torch.equal(value, ended))
        elif value.is_floating_point():
            torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7, msg=name)
    assert moved > 10
    assert bool(refit_moved) == bool(refitted)
    assert not json.loads((out / "metrics.json").read_text())["student"]
    assert not any(name.startswith("student.") for name in found)


def test_the_tower_that_training_began_with_is_in_the_file(
    world: Path, clip_file: Path, rpn_file: Path, tmp_path: Path
) -> None:
    options = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    options += [f"split={world / 'split.json'}", f"weights={clip_file}", f"rpn={rpn_file}", "train.steps=1"]
    options += ["resize.short=[64]", "resize.long=64", "train.batch_size=2", "train.warmup_steps=0"]
    options += ["max_proposals=8", "rois_per_image=8", "keep_student=always"]
    assert main_regionclip(["train-detector", *options, f"out={tmp_path / 'out'}"]) == 0
    found, start = read_weights(tmp_path / "out" / "model.safetensors")[0], read_weights(clip_file)[0]
    held = {
        name.removeprefix("student."): value for name, value in found.items() if name.startswith("student.")
    }
    assert held.keys() == {name for name in start if name.startswith("visual.")}
    assert all(torch.equal(value, start[name]) for name, value in held.items())
    detector, _ = read_detector_file(tmp_path / "out" / "model.safetensors")
    assert detector.student is not None
    assert detector.student.scale == pytest.approx(float(start["logit_scale"].exp()))


@pytest.mark.parametrize(("named", "kept"), [(10, True), (4, True), (3, False)])
def test_a_tower_that_names_base_classes_is_kept(
    make_detector: Callable[..., Detector], world: Path, tmp_path: Path, named: int, kept: bool
) -> None:
    detector = make_detector().eval()
    folders = (RunFolder(tmp_path / str(number), config(), "job") for number in count())

    def keeps(data: RegionDataset, **options: object) -> bool:
        return keeps_student(config(**options), detector, names, data, train, next(folders))

    image = next((world / "images" / "train").iterdir())
    boxes = torch.arange(10.0)[:, None] * 3 + torch.tensor([2.0, 2, 30, 30])
    train = TrainConfig(precision="fp32", device="cpu")

    def labeled(labels: Tensor) -> RegionDataset:
        return RegionDataset([Sample(image, boxes, labels)], TrainingResizeConfig([64], 64, flip=False))

    rows = torch.arange(10)
    data = labeled(rows)
    batch = data.collate([data.item(0, torch.Generator())])
    with torch.no_grad():
        embeddings, _ = detector.roi_heads(detector.feature_maps(batch.images), batch.regions)
    names = F.normalize(embeddings, dim=1)  # every box is nearest to a name of its own
    data = labeled(torch.where(rows < named, rows, (rows + 1) % 10))
    assert named_right(detector, names, data, train) == (named, 10)
    assert keeps(data) == kept
    assert keeps(data, keep_student="always")
    assert not keeps(data, keep_student="never")
    # Names beyond the base classes do not count, and where nothing counts nothing is kept.
    assert named_right(detector, names[:2], labeled(rows), train) == (2, 2)
    assert not keeps(labeled(rows + 10))
    # What was chosen stays; a run that began without a choice keeps none.
    run = RunFolder(tmp_path / "resumed", config(), "job")
    for known in (data, labeled(rows + 10)):
        assert keeps_student(config(), detector, names, known, train, run) == kept
    (tmp_path / "resumed" / "keep_student.json").unlink()
    (tmp_path / "resumed" / "checkpoints").mkdir()
    assert not keeps_student(config(), detector, names, data, train, run)


def test_an_unreadable_image_does_not_choose(make_detector: Callable[..., Detector], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    sample = Sample(tmp_path / "broken.jpg", torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]))
    data = RegionDataset([sample], TrainingResizeConfig([64], 64))
    found = named_right(make_detector(), torch.eye(32)[:2], data, TrainConfig(device="cpu"))
    assert found == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"starting_share": 0.5, "freeze_stages": 5},
        {"keep_student": "always", "freeze_stages": 5},
        {"starting_share": 1.0},
        {"refit": -0.5},
        {"refit": 2.0},
        {"starting_share": -0.1},
        {"background_gate": 1.5},
        {"proposal_distillation": -1.0},
        {"pseudo_weight": -0.1},
        {"distilled_proposals": 0},
        {"proposal_distillation": 1.0, "freeze_stages": 5},
    ],
)
def test_numbers_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        config(**options)
