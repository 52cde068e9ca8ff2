"""Region-text pretraining on mined pairs (arXiv 2112.09106, section 3.3)."""

# B images, N regions of a batch, C concepts of the pool, D embedding size
from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.config import REQUIRED, option
from clip_base.data.sources import read_captions
from clip_base.errors import InputError
from clip_base.files import existing
from clip_base.losses import contrastive
from clip_base.models.clip import CLIP
from clip_base.models.resnet import ModifiedResNet, freeze_batch_norm
from clip_base.pretrain import last_loss
from clip_base.run import RunFolder
from clip_base.tokenizer import Tokenizer
from clip_base.train import TrainConfig
from clip_base.weights import load_clip
from clip_base.weights.native import save_clip
from regionclip.encoder import RegionEncoder
from regionclip.losses import distillation, region_text_contrastive
from regionclip.matching.base import families
from regionclip.samples import RegionSamples, Sample, fit_on
from regionclip.shards import MinedRegion, read_manifest, read_regions
from regionclip.structures import RegionBatch, Regions, whole_images
from regionclip.transforms import ResizeConfig
from regionclip.vocabulary import Vocabulary


@dataclass
class RegionPretrainConfig:
    """Options of region-text pretraining."""

    mined: str = option(REQUIRED, "folder that `regionclip mine` has filled")
    weights: str = option(REQUIRED, "the student's start: a CLIP")
    captions: str = option(
        "", "captions_*.json for the image-text loss; empty: those the shards were mined from"
    )
    images: str = option("", "folder of the images; empty: the one the shards were mined from")
    out: str = option(REQUIRED, "folder for weights, log and metrics", free=True)
    resize: ResizeConfig = option(ResizeConfig(), "size of the training images")
    regions: int = option(100, "most regions an image and step; more are sampled")
    distillation: float = option(1.0, "weight of the cross entropy to the teacher's stored concepts")
    contrastive: float = option(1.0, "weight of the region-text contrastive loss")
    image_text: float = option(1.0, "weight of the image-text contrastive loss")
    temperature: float = option(
        0.0, "what cosines are divided by; 0: the student's own, 1 / exp(logit scale), fixed"
    )
    freeze_stages: int = option(
        2, "stages kept as they are: 0 none, 1 the stem, 2 also layer1, … 4 also layer3"
    )
    freeze_batch_norm: bool = option(True, "keep the statistics and gains of batch norms as they are")
    cache: bool = option(False, "keep decoded images in memory (for small data sets)", free=True)
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
        if max(self.distillation, self.contrastive, self.image_text) <= 0:
            raise InputError(
                "all three losses have weight 0: give distillation, contrastive or image_text a weight"
            )


def freeze(visual: nn.Module, stages: int, batch_norm: bool) -> None:
    """Freezes the first `stages` stages of a ResNet (stem, layer1, layer2, layer3), and batch norms if asked.

    Raises:
        InputError: stages of a tower that has none, or more than there are.
    """
    if batch_norm:
        freeze_batch_norm(visual)
    if stages and not isinstance(visual, ModifiedResNet):
        raise InputError("freeze_stages is for ResNet towers; set it to 0 for a ViT")
    if not 0 <= stages <= 4:
        raise InputError(f"freeze_stages must be 0 to 4, found {stages}")
    parts = [["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"], ["layer1"], ["layer2"], ["layer3"]]
    for name in (name for part in parts[:stages] for name in part):
        getattr(visual, name).requires_grad_(False)


class RegionTextTask(nn.Module):
    """Teaches a CLIP's vision tower to embed regions like their concepts; the text tower stays as it is.

    Args:
        model: the student; its vision tower is trained in place.
        vocabulary: the pool that the regions' concept ids mean.
        config: weights of the losses, temperature, what is frozen.
    """

    concepts: Tensor
    families: Tensor

    def __init__(self, model: CLIP, vocabulary: Vocabulary, config: RegionPretrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        freeze(model.visual, config.freeze_stages, config.freeze_batch_norm)
        model.text.requires_grad_(False)
        model.logit_scale.requires_grad_(False)
        self.encoder = RegionEncoder(
            model.visual, "roi_align" if isinstance(model.visual, ModifiedResNet) else "dense"
        )
        self.scale = 1 / config.temperature if config.temperature else float(model.logit_scale.detach().exp())
        self.register_buffer("concepts", vocabulary.embeddings, persistent=False)  # [C, D]
        self.register_buffer("families", families(vocabulary.names), persistent=False)

    def forward(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Returns the weighted losses that have a weight."""
        regions, config = batch.regions, self.config
        assert regions.concept_ids is not None
        assert regions.concept_probs is not None
        losses = {}
        # Whole images go the way of regions, and with them: one pass over the map for both.
        whole = [whole_images(batch.images)] if config.image_text else []
        wanted = Regions.cat([_bare(regions), *whole])
        both = self.encoder(batch.images, wanted)
        embeddings, images = both[: len(regions)], both[len(regions) :]  # [N, D], [B, D] or [0, D]
        with torch.autocast(embeddings.device.type, enabled=False):
            if config.distillation:
                logits = self.scale * embeddings @ self.concepts.T  # [N, C]
                loss = distillation(logits, regions.concept_ids, regions.concept_probs)
                losses["distillation"] = config.distillation * loss
            if config.contrastive:
                loss = region_text_contrastive(
                    embeddings, self.concepts, regions.concept_ids[:, 0], self.scale, self.families
                )
                losses["region_text"] = config.contrastive * loss
        if config.image_text:
            losses["image_text"] = config.image_text * self._image_text(images, batch.tokens)
        return losses

    def _image_text(self, images: Tensor, tokens: Tensor | None) -> Tensor:
        assert tokens is not None
        with torch.no_grad():
            texts = F.normalize(self.model.encode_text(tokens).float(), dim=-1)
        scale = torch.tensor(self.scale, device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            return contrastive(images, texts, scale)


def _bare(regions: Regions) -> Regions:
    return Regions(regions.boxes, regions.image_index)


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
    return Sample(folder / regions[0].file_name, boxes, None, ids, probs, captions)


def pretrain(config: RegionPretrainConfig) -> None:
    """Trains regions of a CLIP against mined concepts; leaves `out/model.safetensors`."""
    run = RunFolder(config.out, config, "region-pretrain")
    if run.finished() is not None:
        print(f"{run.path} is complete: {run.path / 'model.safetensors'}")
        return
    samples = mined_samples(config.mined, config.images, config.captions)
    vocabulary = Vocabulary.load(Path(config.mined) / "vocabulary.safetensors")
    model = load_clip(config.weights)
    vocabulary.require_width(model.config.embed_dim, config.weights)
    torch.manual_seed(config.train.seed)
    task = RegionTextTask(model, vocabulary, config)
    tokenizer = Tokenizer(model.config.text.context_length)
    data = RegionSamples(samples, config.resize, config.regions, tokenizer, config.cache)
    steps = fit_on(data, task, config.train, run)
    save_clip(model, run.path / "model.safetensors")
    regions = sum(len(sample.boxes) for sample in samples)
    loss = last_loss(run.log_path)
    run.finish({"steps": steps, "images": len(samples), "regions": regions, "loss": loss})
    print(f"{run.path / 'model.safetensors'}: {steps} steps on {regions} regions of {len(samples)} images")
