"""The job `train-detector`: training on base classes; the text-embedding classifier stays frozen.

A proposal network with a backbone of its own stays frozen too (arXiv 2112.09106); one on the detector's trunk
is trained with the detector.
"""

# B images, N sampled regions of a batch, C base names, D embedding size
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.data.coco import annotation_inputs
from clip_base.evaluation.prompts import DEFAULT_TEMPLATES
from clip_base.jobs import plugins
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.models.clip import CLIP, ImageTower
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError
from clip_base.training.loop import TrainConfig, TrainingOptions
from clip_base.training.pretrain import last_loss
from clip_base.weights.load import find, load_clip, weight_files
from regionclip.checkpoints.load import save_detector
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.data.annotations import CocoDetection
from regionclip.models.box_head import BOX_HEADS
from regionclip.models.detector import DELTA_WEIGHTS, Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.region_heads import RegionHeadOptions, choose_head
from regionclip.models.student import FrozenStudent
from regionclip.proposals.rpn.config import ProposalHeadConfig, ProposalNetworkConfig
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import load_network
from regionclip.structures.boxes import encode_deltas, iou
from regionclip.structures.regions import FeatureMaps, RegionBatch, Regions
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.keep import (
    KeepOptions,
    StartingEmbeddings,
    StartingWeights,
    keeps_student,
    with_pseudo_labels,
)
from regionclip.training.region_text import FreezeOptions, freeze
from regionclip.training.samples import BaseClassImages, RegionDataset, Sample, fit_on


@everyday(
    "train-detector annotations=instances.json images=images "
    "weights=runs/regionclip/model.safetensors rpn=runs/rpn/model.safetensors out=runs/detector",
    input="annotations images split",
    output="out",
    model="weights rpn",
    training="train.steps train.epochs train.batch_size train.lr train.seed",
    speed="train.precision train.workers",
)
@dataclass
class TrainDetectorConfig(KeepOptions, RegionHeadOptions, BaseClassImages, FreezeOptions, TrainingOptions):
    """Options of the detector's training.

    The defaults are the published COCO recipe but for `box_head` and `keep_student`.
    """

    weights: str = option(REQUIRED, "CLIP to start from, such as what `regionclip pretrain` wrote")
    rpn: str = option(
        REQUIRED,
        "proposal network from `regionclip train-rpn`, becomes part of the detector and stays frozen unless "
        "it stands on this CLIP's trunk; shared: a new one on this CLIP's trunk, trained with the detector",
    )
    network: ProposalHeadConfig = option(
        ProposalHeadConfig(), "rpn=shared: the proposal network on the CLIP's trunk"
    )
    detector: DetectorConfig = option(DetectorConfig(), "scores and suppression; kept in the weights file")
    resize: TrainingResizeConfig = option(TrainingResizeConfig(), "size of the training images")
    templates: list[str] = option(list(DEFAULT_TEMPLATES), "prompts, averaged; {} is the class name")
    embeddings: str = option(
        "",
        "file of the names' embeddings, as `regionclip embed` writes it, for weights without a text tower; "
        "empty: names are embedded",
    )
    max_proposals: int = option(
        1000, "proposals per image from which regions are sampled", renamed_from="proposals"
    )
    rois_per_image: int = option(512, "regions per image in the loss", renamed_from="rois")
    positive_fraction: float = option(
        0.25, "maximum fraction of objects among them", renamed_from="positive_share"
    )
    positive_iou: float = option(0.5, "minimum IoU with a box of a proposal that counts as an object")
    background_weight: float = option(0.2, "weight of background regions in the classification loss")
    focal_gamma: float = option(
        0.5,
        "exponent of (1 - p) in the focal loss; 0: cross-entropy with a weighted mean",
        renamed_from="focal",
    )
    box_weight: float = option(1.0, "weight of the box regression loss")
    smooth_l1_beta: float = option(0.0, "smooth L1 beta of the box regression loss; 0: L1, as published")
    objectness_weight: float = option(1.0, "shared trunk: weight of the proposals' objectness loss")
    proposal_weight: float = option(1.0, "shared trunk: weight of the proposals' box regression loss")
    box_head: str = option(
        "map",
        "what moves boxes: map (reads layer4's map of the region), embedding (as published), or another "
        "package's box head",
        choices=sorted(plugins.found(BOX_HEADS)),
        renamed_from="boxes",
    )
    background_embedding: str = option(
        "zero",
        "embedding of the background: zero (as published) or learned",
        choices=("zero", "learned"),
        renamed_from="background",
    )
    repeat_threshold: float = option(
        0.0, "repeat images of categories that are in fewer than this fraction of images (LVIS: 0.001)"
    )
    train: TrainConfig = option(
        TrainConfig(
            steps=90_000,
            batch_size=16,
            optimizer="sgd",
            lr=0.002,
            weight_decay=1e-4,
            warmup_steps=5_000,
            schedule="step",
            milestones=[0.6667, 0.8889],
        ),
        "the training loop",
    )

    def __post_init__(self) -> None:
        if self.rois_per_image < 1 or not 0 < self.positive_fraction <= 1:
            raise InputError(
                f"rois_per_image={self.rois_per_image} must be at least 1, "
                f"positive_fraction={self.positive_fraction} in (0, 1]"
            )
        if self.smooth_l1_beta < 0:
            raise InputError(f"smooth_l1_beta must be at least 0, found {self.smooth_l1_beta}")
        self.require_sensible(self.freeze_stages)


class DetectorTask(nn.Module):
    """Trains a detector's vision tower and box head, and a proposal network on that tower's trunk.

    Args:
        detector: trained in place, but for its text tower and a proposal network with a backbone of its own.
        classifier: [C, D] text embeddings of the base names, frozen.
        config: sampling and weights of the losses.
        base: how many of the classifier's names are base classes, which come first; None: all. Boxes of the
            others were mined: they move no box, and count as `pseudo_weight` says.
    """

    classifier: Tensor

    def __init__(
        self, detector: Detector, classifier: Tensor, config: TrainDetectorConfig, base: int | None = None
    ) -> None:
        super().__init__()
        self.detector, self.config = detector, config
        self.base = base
        # Not part of this module: it is not trained, and no checkpoint holds it.
        self.starting = (
            StartingEmbeddings(detector, config.distilled_proposals) if config.proposal_distillation else None
        )
        assert detector.background is not None
        if detector.network is not None:
            detector.network.requires_grad_(detector.shares_trunk)
        detector.background.requires_grad_(config.background_embedding == "learned")
        if not isinstance(detector.clip, ImageTower):
            detector.clip.text.requires_grad_(False)
        detector.clip.logit_scale.requires_grad_(False)
        freeze(detector.clip.visual, config.freeze_stages, config.freeze_batch_norm)
        self.register_buffer("classifier", classifier, persistent=False)

    def train(self, mode: bool = True) -> DetectorTask:
        """Sets the mode; the proposal network, frozen or without batch norms, stays in evaluation mode."""
        super().train(mode)
        if self.detector.network is not None:
            self.detector.network.eval()
        return self

    def forward(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Returns the weighted losses `classification` and `box`, on a shared trunk the proposals' too."""
        detector, config = self.detector, self.config
        assert detector.network is not None
        maps = detector.feature_maps(batch.images)
        losses = {}
        if detector.shares_trunk:
            found = detector.network.losses(batch, maps)
            losses["objectness"] = config.objectness_weight * found["objectness"]
            losses["proposal"] = config.proposal_weight * found["box"]
        proposals = detector.propose(maps, config.max_proposals)
        losses |= self.region_losses(maps, proposals, batch.regions)
        if self.starting is not None:
            kept = self.starting.loss(detector, maps, proposals, batch.regions)
            losses["proposal_distillation"] = config.proposal_distillation * kept
        return losses

    def region_losses(self, maps: FeatureMaps, proposals: Regions, truth: Regions) -> dict[str, Tensor]:
        """Returns the weighted losses `classification` and `box` of regions sampled from proposals.

        Args:
            maps: the trunk's, of the batch.
            proposals: of the whole batch.
            truth: true boxes with labels.
        """
        detector, config = self.detector, self.config
        regions, targets = sample_regions(proposals, truth, len(self.classifier), config)
        labels = regions.labels
        assert labels is not None
        embeddings, deltas = detector.roi_heads(maps, regions)  # [N, D], [N, 4]
        assert deltas is not None
        with torch.autocast(embeddings.device.type, enabled=False):
            logits = detector.logits(embeddings, self.classifier, True)
            base = len(self.classifier) if self.base is None else self.base
            classification = classification_loss(logits, labels, config, base)
            objects = labels < base
            wanted = encode_deltas(regions.boxes[objects], targets[objects], DELTA_WEIGHTS)
            box = F.smooth_l1_loss(deltas[objects], wanted, reduction="sum", beta=config.smooth_l1_beta)
            box = box / _mean_over_processes(float(len(labels)), labels.device).clamp(min=1)
        return {"classification": classification, "box": config.box_weight * box}


def classification_loss(
    logits: Tensor, labels: Tensor, config: TrainDetectorConfig, base: int | None = None
) -> Tensor:
    """Cross entropy with focal scaling and a weight for the background (arXiv 2112.09106, section 4).

    As in the released code, the weights count in the mean's denominator when there is no focal scaling. Over
    several processes each loss is this process's share times their number: the mean is that of all regions.

    Args:
        logits: [N, C + 1]; the last column is the background's.
        labels: [N] int64.
        config: the weights and the exponent.
        base: how many names are base classes; None: all. The others' boxes were mined.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    names = logits.shape[1] - 1
    weights = torch.where(labels == names, config.background_weight, 1.0)
    if base is not None and base < names:
        weights = torch.where((labels >= base) & (labels < names), config.pseudo_weight, weights)
    if not config.focal_gamma:
        total = distributed.mean(weights.sum())
        return (weights * losses).sum() / total.clamp(min=torch.finfo(weights.dtype).tiny)
    # Away from 0, where the gradient of a root is not finite.
    scaling = (-torch.expm1(-losses)).clamp(min=1e-7) ** config.focal_gamma  # (1 - p)^γ
    count = _mean_over_processes(float(len(labels)), labels.device)
    return (weights * scaling * losses).sum() / count.clamp(min=1)


def _mean_over_processes(value: float, device: torch.device) -> Tensor:
    return distributed.mean(torch.tensor(value, device=device))


@torch.no_grad()
def sample_regions(
    proposals: Regions, truth: Regions, background: int, config: TrainDetectorConfig
) -> tuple[Regions, Tensor]:
    """Samples regions for the loss from proposals and the true boxes themselves.

    Several processes choose together what one would.

    Args:
        proposals: of the whole batch.
        truth: true boxes with labels.
        background: the label of regions that overlap no true box enough.
        config: how many, and what counts as an object.

    Returns:
        N regions with labels, and the [N, 4] true box of each (its own box when it is background).
    """
    assert truth.labels is not None
    index = torch.cat([proposals.image_index, truth.image_index])
    boxes = torch.cat([proposals.boxes, truth.boxes])  # [P, 4]
    same = index[:, None] == truth.image_index[None, :]  # [P, G]
    if len(truth):
        overlap, best = (iou(boxes, truth.boxes) * same).max(1)
        positive = overlap >= config.positive_iou
        labels = torch.where(positive, truth.labels[best], background)
        targets = torch.where(positive[:, None], truth.boxes[best], boxes)
    else:
        positive = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        labels, targets = torch.full_like(index, background), boxes
    gated = torch.zeros_like(positive)
    if config.background_gate and proposals.scores is not None:
        gated[: len(proposals)] = proposals.scores >= config.background_gate
    chosen = []
    order = distributed.permutation([len(proposals), len(truth)], boxes.device)
    for image in torch.unique(index).tolist():
        mine = order[index[order] == image]
        objects = mine[positive[mine]][: round(config.rois_per_image * config.positive_fraction)]
        empty = mine[~(positive | gated)[mine]]
        chosen += [objects, empty[: config.rois_per_image - len(objects)]]
    picked = torch.cat(chosen) if chosen else order
    return Regions(boxes[picked], index[picked], labels=labels[picked]), targets[picked]


def repeat_factors(images: Sequence[Tensor], threshold: float) -> Tensor:
    """Returns how often an epoch shows each image: more than once when it holds a rare category.

    A category in a share f of the images has the factor max(1, sqrt(threshold / f)), an image the largest of
    its categories' (arXiv 1908.03195, appendix B).

    Args:
        images: the labels in each image.
        threshold: the share below which a category is rare.
    """
    present = [torch.unique(labels) for labels in images]
    shares = torch.bincount(torch.cat([*present, torch.zeros(0, dtype=torch.int64)])) / max(len(images), 1)
    factors = (threshold / shares.double()).sqrt().clamp(min=1)
    largest = [float(factors[labels].max()) if len(labels) else 1.0 for labels in present]
    return torch.tensor(largest, dtype=torch.float64)


def proposal_network(config: TrainDetectorConfig, clip: CLIP) -> ProposalNetwork:
    """Returns the network that the options name: a file's, or a new one on the CLIP's trunk."""
    visual = clip.map_tower
    if visual is None:
        raise InputError(
            f"weights={config.weights}: a detector is trained on a ResNet tower, this one is a ViT"
        )
    if config.rpn != "shared":
        return load_network(config.rpn, visual)
    sizes = ProposalNetworkConfig.of(config.network, vision=clip.config.vision, share_trunk=True)
    return ProposalNetwork(sizes, visual).eval()


def embeddings_of(config: TrainDetectorConfig, clip: CLIP, names: Sequence[str]) -> Tensor:
    """Returns [C, D], unit length: names as the options' file or the CLIP's own text tower embeds them.

    Raises:
        InputError: a name is not in the file, or its embeddings have another size than the CLIP's.
    """
    if not config.embeddings:
        return embed(clip, Tokenizer(clip.config.text.context_length), names, config.templates).embeddings
    vocabulary = Vocabulary.load(find(config.embeddings), names)
    vocabulary.require_width(clip.config.embed_dim, config.embeddings)
    return vocabulary.embeddings


def new_task(config: TrainDetectorConfig, names: Sequence[str], base: int) -> DetectorTask:
    """Returns the training of a detector as the options begin it.

    Args:
        config: the options.
        names: of the classifier, the base classes first.
        base: how many of them are base classes.
    """
    clip = load_clip(config.weights)
    torch.manual_seed(config.train.seed)
    network = proposal_network(config, clip)
    head = choose_head(config.region_head, config.weights)
    detector = Detector.untrained(
        clip, config.detector, network, config.box_head, config.resize, region_head=head
    )
    return DetectorTask(detector, embeddings_of(config, clip, names), config, base)


def student_of(detector: Detector) -> FrozenStudent:
    """Returns a frozen copy, on the CPU, of the CLIP of a detector that is not trained yet."""
    tower = copy.deepcopy(detector.clip.visual).cpu()
    scale = float(detector.clip.logit_scale.detach().exp())
    return FrozenStudent(tower, scale, region_head=detector.encoder.region_head)


def refit(config: TrainDetectorConfig, steps: int, out: Path) -> TrainDetectorConfig:
    """Returns the options with which the heads learn the maps of a finished tower, which does not move.

    Args:
        config: of the training before.
        steps: how many that made.
        out: the folder of this training.
    """
    count = round(config.refit * steps)
    warmup = min(config.train.warmup_steps, count // 10)
    train = replace(config.train, steps=count, epochs=0.0, warmup_steps=warmup)
    return replace(
        config,
        out=str(out),
        freeze_stages=5,
        freeze_batch_norm=True,
        proposal_distillation=0.0,
        keep_student="never",
        starting_share=0.0,
        train=train,
    )


def with_weights(task: DetectorTask, trained: DetectorTask) -> DetectorTask:
    """Returns `task` with the weights of another training's detector, which may be sharded."""
    task.detector.load_state_dict(distributed.full(trained.detector.state_dict()))
    return task


def train_detector(config: TrainDetectorConfig) -> None:
    """Trains an open-vocabulary detector on base classes; writes `out/model.safetensors`."""
    inputs = {**weight_files(config, "weights"), **annotation_inputs(config, "annotations")}
    inputs |= files_of(config, "split", "rpn", "embeddings")
    if config.pseudo_labels:
        inputs |= annotation_inputs(config, "pseudo_labels")
    run = RunFolder(config.out, config, "region-train-detector", inputs)
    if run.finished() is not None:
        print(f"{run.path} is complete: {run.path / 'model.safetensors'}")
        return
    dataset, split = config.read()
    records, names = list(dataset), list(split.base)
    if config.pseudo_labels:
        mined = CocoDetection(config.pseudo_labels, config.images)
        records, further = with_pseudo_labels(records, mined, split.base)
        names += further
    task = new_task(config, names, len(split.base))
    data = RegionDataset([Sample.of_record(record) for record in records], config.resize, cache=config.cache)
    weights = None
    if config.repeat_threshold:
        weights = repeat_factors([record.labels for record in dataset], config.repeat_threshold)
    distributed.start()
    student = None
    base = task.classifier[: len(split.base)]
    if config.freeze_stages < 5 and keeps_student(config, task.detector, base, data, config.train, run):
        student = student_of(task.detector)
    start = StartingWeights(task.detector.clip.visual, config.starting_share)
    steps = fit_on(data, task, config.train, run, weights)
    if config.starting_share:
        start.mix_into(task.detector.clip.visual)
        again = refit(config, steps, run.path / "heads")
        if again.train.steps:
            task = with_weights(new_task(again, names, len(split.base)), task)
            job = RunFolder(again.out, again, "region-train-detector")
            made = fit_on(data, task, again.train, job, weights)
            job.finish({"steps": made, "loss": last_loss(job.log_path)})
    detector = task.detector.with_student(student)
    save_detector(detector, run.path / "model.safetensors", split.base)
    last = last_loss(run.log_path)
    run.finish({"steps": steps, "images": len(dataset), "loss": last, "student": student is not None})
    print(f"{run.path / 'model.safetensors'}: {steps} steps on {len(dataset)} images")
