"""The job `train-rpn`: class-agnostic training of the proposal network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_base.data.coco import annotation_inputs
from clip_base.jobs.config import option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of, hashes_of
from clip_base.jobs.skipped import MAX_SKIPPED
from clip_base.models.resnet import ModifiedResNet
from clip_base.runtime import distributed
from clip_base.runtime.precision import autocast, pick_device
from clip_base.runtime.progress import track
from clip_base.training.loop import TrainConfig, TrainingOptions
from clip_base.training.pretrain import last_loss
from regionclip.data.annotations import CocoDetection
from regionclip.data.batches import note_skipped, read_batches, read_record
from regionclip.data.categories import load_split
from regionclip.metrics.recall import RecallMeter, described
from regionclip.proposals.rpn.config import ProposalNetworkOptions
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import build_network, load_network, save_network
from regionclip.structures.regions import RegionBatch
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.samples import BaseClassImages, RegionDataset, Sample, fit_on


@everyday(
    "train-rpn annotations=instances.json images=images out=runs/rpn",
    input="annotations images split val_annotations val_images",
    output="out",
    model="network.backbone network.backbone_weights",
    training="train.steps train.epochs train.batch_size train.lr",
    speed="train.precision train.workers",
)
@dataclass
class TrainRPNConfig(BaseClassImages, TrainingOptions):
    """Options of the proposal network's training."""

    val_annotations: str = option(
        "",
        "annotations whose boxes measure recall at the end; empty: not measured. A finished folder is "
        "measured again with other ones",
        runtime_only=True,
    )
    val_images: str = option(
        "", "folder of the validation images; empty: the same as `images`", runtime_only=True
    )
    network: ProposalNetworkOptions = option(ProposalNetworkOptions(), "the proposal network")
    objectness_weight: float = option(1.0, "weight of the objectness loss")
    box_weight: float = option(1.0, "weight of the box regression loss")
    resize: TrainingResizeConfig = option(TrainingResizeConfig(), "size of the images")
    train: TrainConfig = option(
        TrainConfig(
            steps=90_000, batch_size=16, optimizer="sgd", lr=0.02, weight_decay=1e-4, schedule="step"
        ),
        "the training loop",
    )


class RPNTask(nn.Module):
    """Trains a proposal network: images and boxes in, its two weighted losses out.

    Args:
        network: trained in place.
        objectness_weight: factor of the objectness loss.
        box_weight: factor of the box loss.
    """

    def __init__(
        self, network: ProposalNetwork, objectness_weight: float = 1.0, box_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.network = network
        self.weights = {"objectness": objectness_weight, "box": box_weight}

    def forward(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Returns the weighted losses `objectness` and `box`, float32 scalars."""
        return {name: self.weights[name] * loss for name, loss in self.network.losses(batch).items()}


def train_rpn(config: TrainRPNConfig) -> None:
    """Trains a class-agnostic proposal network on base-class boxes; writes `out/model.safetensors`."""
    inputs = annotation_inputs(config, "annotations") | files_of(config, "split", "network")
    run = RunFolder(config.out, config, "region-train-rpn", inputs)
    measured_on = hashes_of(annotation_inputs(config, "val_annotations")).get("val_annotations", "")
    metrics, file = run.finished(), run.path / "model.safetensors"
    if metrics is not None and measured_on in ("", metrics.get("measured_on")):
        print(f"{run.path} is complete: {file}")
        return
    validation = validation_data(config)  # read before the first step, so that a fault of its shows then
    if metrics is None:
        network, metrics = _train(config, run)
        save_network(network, file)
    else:
        trunk = build_network(config.network).trunk if config.network.share_trunk else None
        network = load_network(file, trunk if isinstance(trunk, ModifiedResNet) else None)
        network.to(pick_device(config.train.device))
    if validation is not None:
        found, skipped = recall(network.eval(), config, *validation, run.path / "val_skipped.jsonl")
        metrics |= {**found, "val_skipped": skipped, "measured_on": measured_on}
        print(described(found))
    run.finish(metrics)
    print(f"{file}: {metrics['steps']} steps on {metrics['images']} images")


def _train(config: TrainRPNConfig, run: RunFolder) -> tuple[ProposalNetwork, dict[str, Any]]:
    """Returns the trained network, and what `metrics.json` says of the training."""
    dataset, _ = config.read()
    torch.manual_seed(config.train.seed)
    network = build_network(config.network)
    task = RPNTask(network, config.objectness_weight, config.box_weight)
    data = RegionDataset([Sample.of_record(record) for record in dataset], config.resize, cache=config.cache)
    if network.config.share_trunk:
        # It is no part of the task, so the loop does not move it.
        distributed.start()
        network.trunk.to(pick_device(config.train.device))
    steps = fit_on(data, task, config.train, run)
    return network, {"steps": steps, "images": len(dataset), "loss": last_loss(run.log_path)}


def validation_data(config: TrainRPNConfig) -> tuple[CocoDetection, list[bool]] | None:
    """Returns the validation images, and which of their categories are novel; None when there are none.

    Raises:
        InputError: a malformed file, a split that does not fit it, or a folder without the images.
    """
    if not config.val_annotations:
        return None
    dataset = CocoDetection(config.val_annotations, config.val_images or config.images)
    split = load_split(config.split, dataset.categories, dataset.frequencies)
    dataset = dataset.restrict(split.all).without_crowds()
    print(f"validation: {dataset.report()}")
    return dataset, split.is_novel(dataset.categories)


def recall(
    network: ProposalNetwork,
    config: TrainRPNConfig,
    dataset: CocoDetection,
    novel: list[bool],
    listed: Path,
) -> tuple[dict[str, float], int]:
    """Returns recall on the validation boxes, base and novel apart, and how many images are unreadable.

    Args:
        network: in evaluation mode.
        config: says how images are seen.
        dataset: the validation images.
        novel: [C], which of their categories are novel.
        listed: the file that lists the unreadable images.
    """
    device = pick_device(config.train.device)
    skipped: dict[int, str] = {}
    meter, is_novel = RecallMeter(apart=any(novel)), torch.tensor(novel)
    groups = read_batches(
        dataset,
        read_record,
        config.resize,
        16,
        device,
        on_skip=lambda record, reason: skipped.update({record.image_id: reason}),
    )
    for batch in (batch for group in track(groups, "recall") for batch in group.batches):
        with torch.no_grad(), autocast(config.train.precision, device):
            found = network.propose(batch.images, 1000).to("cpu")
        for slot, (record, transform) in enumerate(zip(batch.items, batch.transforms, strict=True)):
            boxes = transform.invert_boxes(found.of_image(slot).boxes)
            meter.add(record.boxes, boxes, is_novel[record.labels])
    note_skipped(listed, skipped, dataset, MAX_SKIPPED)
    return meter.metrics(), len(skipped)
