"""Region pretraining: on mined region-text pairs (arXiv 2112.09106, 3.3), on a tower's own view of crops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from clip_base import distributed
from clip_base.config import REQUIRED, Part, option, part
from clip_base.data.folders import IMAGE_SUFFIXES
from clip_base.data.sources import read_captions
from clip_base.errors import InputError
from clip_base.files import existing
from clip_base.models.clip import CLIP
from clip_base.pretrain import last_loss
from clip_base.run import RunFolder
from clip_base.tokenizer import Tokenizer
from clip_base.train import TrainConfig
from clip_base.weights import load_clip
from clip_base.weights.native import save_clip
from regionclip.concepts import forms, given_classes
from regionclip.losses import REGION_TEXT
from regionclip.region_text import RegionTextTask, Teacher
from regionclip.samples import PatchSamples, RegionSamples, Sample, fit_on
from regionclip.shards import MinedRegion, read_manifest, read_regions
from regionclip.transforms import ResizeConfig
from regionclip.vocabulary import Vocabulary


@dataclass
class RegionPretrainConfig:
    """Options of region pretraining."""

    mined: str = option(
        "", "folder that `regionclip mine` has filled; empty: crops alone, on patches of images"
    )
    weights: str = option(REQUIRED, "the student's start: a CLIP")
    captions: str = option(
        "", "captions_*.json for the image-text loss; empty: those the shards were mined from"
    )
    images: str = option("", "folder of the images; empty: the one the shards were mined from")
    out: str = option(REQUIRED, "folder for weights, log and metrics", free=True)
    resize: ResizeConfig = option(ResizeConfig(), "size of the training images")
    regions: int = option(100, "most regions an image and step; more are sampled")
    cells: int = option(6, "without mined=: an image is cut into m by n patches, both drawn from 1 to this")
    distillation: float = option(1.0, "weight of the divergence from the teacher's concepts")
    contrastive: float = option(1.0, "weight of the region-text contrastive loss")
    image_text: float = option(1.0, "weight of the image-text contrastive loss")
    crops: float = option(
        0.0, "weight of the cosine distance to what the tower, as it was, makes of the regions' crops"
    )
    region_text: Part = part(REGION_TEXT, "softmax", "form of the region-text contrastive loss")
    memory: int = option(0, "regions of earlier steps kept as further negatives of the contrastive loss")
    synonyms: list[str] = option(
        [], "class lists (LVIS's, say) whose names for one thing are no negatives of each other"
    )
    teacher: str = option(
        "", "mining's CLIP, to name regions within the step over the whole pool; empty: stored concepts"
    )
    temperature: float = option(
        0.0, "what cosines are divided by; 0: the student's own, 1 / exp(logit scale)"
    )
    learn_temperature: bool = option(False, "train the temperature, as CLIP's: never below 0.01")
    train_text: bool = option(False, "train the text tower too; the distillation needs it frozen")
    freeze_stages: int = option(
        2, "stages kept as they are: 0 none, 1 the stem, 2 also layer1, … 4 also layer3"
    )
    freeze_batch_norm: bool = option(True, "keep the statistics and gains of batch norms as they are")
    cache: bool = option(False, "keep decoded images in memory (for small data sets)", free=True)
    lr_batch: int = option(
        0, "batch that train.lr is meant for; for another it is scaled in proportion; 0: taken as it is"
    )
    train: TrainConfig = option(
        TrainConfig(
            steps=600_000,
            batch_size=96,
            optimizer="sgd",
            lr=0.002,
            weight_decay=1e-4,
            schedule="step",
            milestones=[0.5, 0.875],
            max_grad_norm=5.0,
        ),
        "the training loop; the defaults are the published recipe",
    )

    def __post_init__(self) -> None:
        paired = max(self.distillation, self.contrastive, self.image_text)
        softmax = self.contrastive > 0 and self.region_text["name"] != "sigmoid"
        faults = {
            "all losses have weight 0: give distillation, contrastive, image_text or crops a weight": (
                max(paired, self.crops) <= 0
            ),
            "give mined=, what `regionclip mine` made, or images= with crops as the only weighted loss": (
                not self.mined and (paired > 0 or not self.images)
            ),
            "the pool's embeddings are of the frozen text tower: set distillation=0 or train_text=false": (
                self.train_text and self.distillation > 0
            ),
            "train_text needs a loss that reads texts: give contrastive or image_text a weight": (
                self.train_text and max(self.contrastive, self.image_text) <= 0
            ),
            "learn_temperature needs a loss with a temperature: distillation, image_text or a softmax": (
                self.learn_temperature and max(self.distillation, self.image_text) <= 0 and not softmax
            ),
            "memory holds negatives of the contrastive loss: give contrastive a weight or set memory=0": (
                self.memory > 0 and self.contrastive <= 0
            ),
            "teacher is for the distillation: give distillation a weight or leave teacher empty": (
                bool(self.teacher) and self.distillation <= 0
            ),
            f"memory, lr_batch and temperature must be at least 0, cells at least 1; found {self.memory}, "
            f"{self.lr_batch}, {self.temperature:g} and {self.cells}": (
                min(self.memory, self.lr_batch, self.temperature) < 0 or self.cells < 1
            ),
        }
        for message, holds in faults.items():
            if holds:
                raise InputError(message)


def mined_samples(mined: str, images: str, captions: str) -> list[Sample]:
    """Reads mined regions as training samples, one an image.

    Args:
        mined: folder of shards.
        images: folder of the images; "" is the manifest's.
        captions: COCO captions; "" is the manifest's.
    """
    manifest = read_manifest(mined)
    folder = existing(images or manifest["images_folder"], "images folder")
    texts, _ = read_captions(captions or manifest["config"]["captions"])
    regions = list(read_regions(mined))
    if not regions:
        raise InputError(f"{mined} holds no regions; see its skipped.jsonl, loosen the matcher's thresholds")
    width = max(len(region.concept_ids) for region in regions)
    return [
        _sample(folder, list(group), tuple(texts.get(image_id, ())), width)
        for image_id, group in groupby(regions, key=lambda region: region.image_id)
    ]


def _sample(folder: Path, regions: list[MinedRegion], captions: tuple[str, ...], width: int) -> Sample:
    """Makes one image's sample; concepts are padded to `width` with concept 0 of probability 0."""
    ids, probs = torch.zeros(len(regions), width, dtype=torch.int64), torch.zeros(len(regions), width)
    for row, region in enumerate(regions):
        ids[row, : len(region.concept_ids)] = torch.tensor(region.concept_ids)
        probs[row, : len(region.concept_probs)] = torch.tensor(region.concept_probs)
    boxes = torch.tensor([region.box for region in regions])
    first = regions[0]
    size = (first.height, first.width)
    return Sample(folder / first.file_name, boxes, None, ids, probs, captions, size)


def picture_samples(folder: str) -> list[Sample]:
    """Returns one sample without boxes for each picture in a folder and its subfolders, sorted by path."""
    root = existing(folder, "images folder")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"images folder {root} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [Sample(path, torch.zeros(0, 4)) for path in paths]


def one_things(manifest: dict[str, Any], class_lists: list[str]) -> list[list[str]]:
    """Returns lists of names of one thing: those of the mined pool's classes and of further class lists."""
    classes = [(name, *words) for name, words in manifest.get("synonyms", {}).items()]
    classes += given_classes(class_lists)
    return [[entry[0], *(form for word in entry for form in forms(word))] for entry in classes]


def scaled(train: TrainConfig, lr_batch: int) -> TrainConfig:
    """Returns the training with the learning rate in proportion to its batch, and says so.

    Args:
        train: its lr is for batches of `lr_batch`.
        lr_batch: 0 leaves the learning rate as it is.
    """
    if lr_batch in (0, train.batch_size):
        return train
    lr = train.lr * train.batch_size / lr_batch
    print(f"learning rate {lr:g}: {train.lr:g} is for a batch of {lr_batch}, this one is {train.batch_size}")
    return replace(train, lr=lr)


def pretrain(config: RegionPretrainConfig) -> None:
    """Trains regions of a CLIP against mined concepts or crops; leaves `out/model.safetensors`."""
    run = RunFolder(config.out, config, "region-pretrain")
    if run.finished() is not None:
        print(f"{run.path} is complete: {run.path / 'model.safetensors'}")
        return
    distributed.start()
    model = load_clip(config.weights)
    torch.manual_seed(config.train.seed)
    task, data = _on_shards(config, model) if config.mined else _on_pictures(config, model)
    steps = fit_on(data, task, scaled(config.train, config.lr_batch), run)
    save_clip(model, run.path / "model.safetensors")
    regions = sum(len(sample.boxes) for sample in data.samples)
    loss = last_loss(run.log_path)
    run.finish({"steps": steps, "images": len(data), "regions": regions, "loss": loss})
    what = f"{regions} regions of {len(data)} images" if config.mined else f"patches of {len(data)} images"
    print(f"{run.path / 'model.safetensors'}: {steps} steps on {what}")


def _on_shards(config: RegionPretrainConfig, model: CLIP) -> tuple[RegionTextTask, RegionSamples]:
    samples = mined_samples(config.mined, config.images, config.captions)
    manifest = read_manifest(config.mined)
    vocabulary = Vocabulary.load(Path(config.mined) / "vocabulary.safetensors")
    vocabulary.require_width(model.config.embed_dim, config.weights)
    teacher = Teacher.of_mining(config.teacher, manifest) if config.teacher else None
    task = RegionTextTask(model, vocabulary, config, teacher, one_things(manifest, config.synonyms))
    tokenizer = Tokenizer(model.config.text.context_length)
    return task, RegionSamples(samples, config.resize, config.regions, tokenizer, config.cache)


def _on_pictures(config: RegionPretrainConfig, model: CLIP) -> tuple[RegionTextTask, RegionSamples]:
    samples = picture_samples(config.images)
    data = PatchSamples(samples, config.cells, config.resize, config.regions, cache=config.cache)
    return RegionTextTask(model, None, config), data
