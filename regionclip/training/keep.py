"""What a detector's training does so that names without boxes are not forgotten.

Training on base classes alone teaches a detector that everything else is background, and moves its embeddings
to where the base classes are told apart. Five remedies, of which the first is the default:

- The tower that training began with stays beside the trained one, and their probabilities are combined; see
  `regionclip.models.student`.
- The finished weights lie between those that training began with and those that it reached (WiSE-FT, arXiv
  2109.01903).
- Proposals that overlap no base box keep the embeddings that the starting CLIP gives them (ViLD, arXiv
  2104.13921, section 3.4; its distance is L1, here it is the cosine's).
- Regions that the proposal network takes for objects although no base box is there are not taught to be
  background: the learnt objectness is a gate (as MarvelOVD gates pseudo-labels, arXiv 2407.21465).
- Boxes that were mined for other names are labels, too (PB-OVD, arXiv 2111.09452; Detic, arXiv 2201.02605).
"""

# N regions, G true boxes, B images, D embedding size
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.jobs.run import RunFolder
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast, pick_device
from clip_base.storage.files import read_json, write_json
from clip_base.storage.remote import RemoteError
from clip_base.training.loop import TrainConfig
from regionclip.checkpoints.interpolate import mix
from regionclip.data.annotations import CocoDetection, ImageAnnotations
from regionclip.models.detector import Detector
from regionclip.models.region_encoder import RegionEncoder
from regionclip.structures.boxes import iou
from regionclip.structures.regions import FeatureMaps, Regions
from regionclip.training.losses import cosine_distance
from regionclip.training.samples import RegionDataset
from regionclip.training.teacher import frozen, seen_by

SAME_OBJECT = 0.5  # IoU with a base box above which a mined box is left out
WORTH_KEEPING = 1 / 3  # of the base classes' boxes that the tower must name right before training
LOOKED_AT = 64  # images in which it has to
CHOICE = "keep_student.json"


@dataclass(kw_only=True)
class KeepOptions:
    """What training does so that names without boxes are not forgotten."""

    keep_student: str = option(
        "auto",
        "whether the file also holds the vision tower that training began with, whose probabilities are "
        "combined with the trained ones: novel names are kept, for up to twice the time per image "
        "(student.weights=none leaves it out); auto: where it names a third of the base classes' boxes right "
        "before training; never: as published",
        choices=("auto", "always", "never"),
    )
    starting_share: float = option(
        0.0,
        "share of the vision tower's weights before training in the finished ones, in [0, 1): keeps novel "
        "names too, though less than keep_student does, and detection takes no longer (WiSE-FT)",
    )
    refit: float = option(
        0.25,
        "with a starting share: steps, as a share of the training's, in which the box head (and that of the "
        "proposals, on a shared trunk) learns the maps of the finished tower; 0: none",
    )
    proposal_distillation: float = option(
        0.0,
        "weight of the cosine distance to the starting CLIP's embeddings of proposals that overlap no base "
        "box, so that these keep their meaning (ViLD); takes a second pass of the tower",
    )
    distilled_proposals: int = option(32, "proposal_distillation: proposals per image, sampled")
    background_gate: float = option(
        0.0,
        "regions without a base box whose objectness is at least this are not used as background: they may "
        "show something else; 0: all are used",
    )
    pseudo_labels: str = option(
        "",
        "boxes that were mined for other names, in COCO's format, as `regionclip export` writes them: "
        "their categories that are not base become further names of the classifier",
    )
    pseudo_weight: float = option(1.0, "weight of these boxes in the classification loss; they move no box")

    def require_sensible(self, freeze_stages: int) -> None:
        """Checks the numbers, and that what was asked for can do something.

        Raises:
            InputError: an option out of its range, or without an effect.
        """
        if not 0 <= self.starting_share < 1:
            raise InputError(f"starting_share must be in [0, 1), found {self.starting_share:g}")
        if freeze_stages > 4 and (self.starting_share or self.keep_student == "always"):
            raise InputError(
                f"freeze_stages={freeze_stages} freezes the whole tower, which is its own student then: "
                "leave out starting_share and keep_student=always"
            )
        if not 0 <= self.refit <= 1:
            raise InputError(f"refit must be in [0, 1], found {self.refit:g}")
        if min(self.proposal_distillation, self.pseudo_weight) < 0 or self.distilled_proposals < 1:
            raise InputError(
                f"proposal_distillation={self.proposal_distillation:g} and pseudo_weight="
                f"{self.pseudo_weight:g} must be at least 0, distilled_proposals={self.distilled_proposals} "
                "at least 1"
            )
        if not 0 <= self.background_gate <= 1:
            raise InputError(f"background_gate must be in 0…1, found {self.background_gate:g}")
        if self.proposal_distillation and freeze_stages > 4:
            raise InputError(
                f"proposal_distillation has nothing to keep where freeze_stages={freeze_stages} freezes the "
                "whole tower; set it to 0"
            )


def keeps_student(
    config: KeepOptions,
    detector: Detector,
    classifier: Tensor,
    data: RegionDataset,
    train: TrainConfig,
    run: RunFolder,
) -> bool:
    """Whether the tower that training begins with shall stay beside the trained one; says how `auto` chose.

    A tower that cannot name the base classes yet has little to keep: its probabilities then cost a detector
    more than they bring. The choice stays in the run's folder, so that a resumed run takes the same; a run
    that began before there was a choice keeps none.

    Args:
        config: the options.
        detector: as it is before training.
        classifier: [C, D], unit length: the base names.
        data: the training images.
        train: device and precision.
        run: the run's folder.
    """
    if config.keep_student != "auto":
        return config.keep_student == "always"
    file = run.path / CHOICE
    chosen, begun = distributed.any_of(file.exists(), (run.path / "checkpoints").exists())
    if chosen:
        return bool(read_json(file, "choice of keep_student")["kept"])
    if begun:
        return False
    right, boxes = named_right(detector, classifier, data, train)
    kept = bool(boxes) and right >= WORTH_KEEPING * boxes
    if distributed.is_first():
        write_json(file, {"kept": kept, "right": right, "boxes": boxes})
        answer = f"before training the tower names {right:.0f} of {boxes:.0f} boxes of base classes right"
        print(f"keep_student=auto: {'yes' if kept else 'no'}; {answer}")
    return kept


@torch.no_grad()
def named_right(
    detector: Detector, classifier: Tensor, data: RegionDataset, train: TrainConfig
) -> tuple[float, float]:
    """Returns how many true boxes of base classes a detector names right, and of how many.

    The images lie evenly in the dataset. Of several processes each looks at all of them; the mean counts.

    Args:
        detector: moved to the device of the training, and into evaluation mode.
        classifier: [C, D], unit length: the base names.
        data: images whose labels below C are of base names; the others do not count.
        train: device, precision and seed.
    """
    device = pick_device(train.device)
    detector.to(device).eval()
    generator = torch.Generator().manual_seed(train.seed)
    counts = torch.zeros(2, device=device)
    for index in torch.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).long().tolist():
        try:
            item = data.item(index, generator)
        except RemoteError:  # says nothing about the image
            raise
        except InputError:  # training skips it, and says so
            continue
        batch = data.collate([item]).to(device)
        assert batch.regions.labels is not None
        base = batch.regions.labels < len(classifier)
        with autocast(train.precision, device):
            embeddings, _ = detector.roi_heads(detector.feature_maps(batch.images), batch.regions)
        found = (embeddings.float() @ classifier.to(device).T).argmax(1)
        counts += torch.stack([(found == batch.regions.labels)[base].sum(), base.sum()])
    right, boxes = distributed.mean(counts).tolist()
    return right, boxes


class StartingWeights:
    """The weights of a tower before training, to be mixed into the trained ones.

    Args:
        tower: as it is before training; its weights are copied.
        share: of the starting weights in the mix, in [0, 1).
    """

    def __init__(self, tower: nn.Module, share: float) -> None:
        self.share = share
        self.weights = {name: value.detach().clone() for name, value in tower.state_dict().items() if share}

    @torch.no_grad()
    def mix_into(self, tower: nn.Module) -> None:
        """Replaces the trained weights of the same tower by share · start + (1 − share) · trained.

        Where the tower is sharded, all processes must call it together.
        """
        trained = tower.state_dict()
        for name, start in self.weights.items():
            ended = trained[name]
            ended.copy_(mix(distributed.shard_like(start.to(ended.device), ended), ended, 1 - self.share))


class StartingEmbeddings:
    """The frozen tower that training began with, as the target of proposals without a base box.

    Args:
        detector: as it is before training; its vision tower is copied.
        per_image: proposals per image that are compared.
    """

    def __init__(self, detector: Detector, per_image: int) -> None:
        tower = frozen(copy.deepcopy(detector.clip.visual))
        self.encoder = RegionEncoder(tower, "roi_align", region_head=detector.encoder.region_head)
        self.per_image = per_image

    def loss(self, detector: Detector, maps: FeatureMaps, proposals: Regions, truth: Regions) -> Tensor:
        """Returns the mean cosine distance, over several processes this one's share times their number.

        Args:
            detector: in training.
            maps: the images, and the maps of its trunk.
            proposals: of the whole batch.
            truth: true boxes; proposals that overlap one are left out.
        """
        chosen = self._sampled(proposals, truth)
        embeddings, _ = detector.encoder.roi_heads(maps, chosen)
        units = torch.nn.functional.normalize(embeddings.float(), dim=-1)
        targets = seen_by(self.encoder, maps.images, chosen)
        count = sum(distributed.row_counts(units))
        return distributed.world() * cosine_distance(units, targets) / max(count, 1)

    @torch.no_grad()
    def _sampled(self, proposals: Regions, truth: Regions) -> Regions:
        outside = torch.ones(len(proposals), dtype=torch.bool, device=proposals.boxes.device)
        if len(truth):
            same = proposals.image_index[:, None] == truth.image_index
            outside = (iou(proposals.boxes, truth.boxes) * same).amax(1) < SAME_OBJECT
        order = distributed.permutation([len(proposals)], proposals.boxes.device)
        order = order[outside[order]]
        parts = [
            order[proposals.image_index[order] == image][: self.per_image]
            for image in torch.unique(proposals.image_index).tolist()
        ]
        picked = torch.cat(parts) if parts else order
        return Regions(proposals.boxes[picked], proposals.image_index[picked])


def with_pseudo_labels(
    records: Sequence[ImageAnnotations], mined: CocoDetection, base: Sequence[str]
) -> tuple[list[ImageAnnotations], list[str]]:
    """Returns the records with mined boxes of other names, and those names.

    Args:
        records: images with boxes of base classes.
        mined: boxes of the same images, found by their paths.
        base: the base classes, by label; the further names are labeled after them.

    Raises:
        InputError: no mined box is of another name and in one of the images.
    """
    names = [name for name in mined.categories if name not in set(base)]
    found = {record.path: record for record in mined.restrict(names, keep_empty=False)} if names else {}
    merged, added = [], 0
    for record in records:
        other = found.get(record.path)
        if other is not None:
            record, count = _merged(record, other, len(base))
            added += count
        merged.append(record)
    if not added:
        raise InputError(
            "pseudo_labels: none of their boxes is of a name that is not base and in one of the "
            f"{len(records)} training images; export them with the same images=, and names besides the base "
            "classes"
        )
    print(f"{added} mined boxes of {len(names)} further names")
    return merged, names


def _merged(record: ImageAnnotations, other: ImageAnnotations, first: int) -> tuple[ImageAnnotations, int]:
    """Returns a record with another's boxes that are on none of its own, and how many these are."""
    boxes, labels = other.boxes, other.labels + first
    if len(record.boxes) and len(boxes):
        apart = iou(boxes, record.boxes).amax(1) < SAME_OBJECT
        boxes, labels = boxes[apart], labels[apart]
    both = torch.cat([record.boxes, boxes]), torch.cat([record.labels, labels])
    crowd = torch.cat([record.iscrowd, torch.zeros(len(boxes), dtype=torch.bool)])
    return replace(record, boxes=both[0], labels=both[1], iscrowd=crowd), len(boxes)
