"""Task and losses of region pretraining."""

# B images, n regions of this process, P concepts among those of all, C of the pool, K kept a region or
# prompts a concept, T token positions, D embedding size
from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.evaluation.prompts import fill
from clip_base.jobs.config import REQUIRED, Plugin, build_plugin, option, plugin
from clip_base.jobs.everyday import everyday
from clip_base.models.bottleneck import freeze_batch_norm
from clip_base.models.clip import CLIP, ImageTower
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.tokenizer import Tokenizer
from clip_base.models.vit import VisionTransformer
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError
from clip_base.training.loop import TrainConfig, TrainingOptions
from clip_base.training.losses import row_entropy
from clip_base.training.tasks import MAX_LOGIT_SCALE
from regionclip.concepts.synonyms import concept_groups
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.models.region_encoder import RegionEncoder
from regionclip.models.region_heads import PerRegionHead, RegionHeadOptions
from regionclip.structures.regions import RegionBatch, Regions, whole_images
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.losses import (
    REGION_TEXT,
    CrossBatchMemory,
    RegionTextBatch,
    SigmoidRegionText,
    SoftNames,
    cosine_distance,
    distillation,
    local_shard,
)
from regionclip.training.teacher import Teacher, frozen, seen_by


@dataclass(kw_only=True)
class FreezeOptions:
    """What of a vision tower is not trained."""

    freeze_stages: int = option(
        2,
        "frozen stages: 0 none, 1 the stem, 2 also layer1, … 4 also layer3, 5 also the head (layer4 and "
        "attention pool), so that only what is added to the tower is trained",
    )
    freeze_batch_norm: bool = option(True, "freeze the statistics and gains of batch norms")


@everyday(
    "pretrain mined=mined weights=RN50 out=runs/regionclip",
    input="mined captions images",
    output="out",
    model="weights region_head",
    training="train.steps train.epochs train.batch_size train.lr train.seed",
    speed="train.precision train.workers",
)
@dataclass
class RegionPretrainConfig(RegionHeadOptions, FreezeOptions, TrainingOptions):
    """Options of region pretraining."""

    mined: str = option("", "folder of mined shards; empty: only the crop loss, on patches of images")
    weights: str = option(REQUIRED, "initial weights of the student: a CLIP")
    captions: str = option("", "captions_*.json for the image-text loss; empty: the mined captions")
    images: str = option("", "folder of the images; empty: the mined images")
    resize: TrainingResizeConfig = option(TrainingResizeConfig(), "size of the training images")
    max_regions: int = option(
        100, "maximum number of regions per image and step, sampled", renamed_from="regions"
    )
    shuffle_shards: int = option(
        0,
        "mined shards (tars) that are shuffled together and read before the next ones; 0: all, but 8 of "
        "compressed tars",
    )
    max_grid: int = option(
        6,
        "without mined=: an image is divided into m by n patches, both sampled from 1 to this",
        renamed_from="cells",
    )
    distillation: float = option(1.0, "weight of the divergence from the teacher's concept probabilities")
    contrastive: float = option(1.0, "weight of the region-text contrastive loss")
    image_text: float = option(1.0, "weight of the image-text contrastive loss")
    crop_distillation: float = option(
        0.0,
        "weight of the cosine distance to the frozen tower's embeddings of the regions' crops",
        renamed_from="crops",
    )
    region_text: Plugin = plugin(REGION_TEXT, "softmax", "variant of the region-text contrastive loss")
    memory: int = option(0, "regions of earlier steps used as further negatives in the contrastive loss")
    synonyms: list[str] = option(
        [], "class lists, such as LVIS's, whose synonyms are not used as negatives of each other"
    )
    teacher: str = option(
        "",
        "the teacher used for mining, to compute concept probabilities online over the whole pool; empty: "
        "stored",
    )
    temperature: float = option(0.0, "divisor of the cosines; 0: the student's own, 1 / exp(logit scale)")
    learn_temperature: bool = option(False, "train the temperature like CLIP's, with a minimum of 0.01")
    text_embeddings: str = option(
        "auto",
        "whose text tower embeds the concepts: teacher: as mined, for a student in its space, which "
        "then has no text tower; student: its own; auto: as mined where that tower is the student's, else "
        "its own",
        choices=("auto", "student", "teacher"),
    )
    train_text: bool = option(False, "also train the text tower; distillation needs it frozen")
    lr_reference_batch_size: int = option(
        0,
        "batch size that train.lr is meant for; for others it is scaled linearly; 0: not scaled",
        renamed_from="lr_batch",
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
            "all losses have weight 0: give distillation, contrastive, image_text or crop_distillation one": (
                max(paired, self.crop_distillation) <= 0
            ),
            "give mined=, what `regionclip mine` made, or images= with crop_distillation as the only loss": (
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
            "text_embeddings=teacher leaves no text tower: set image_text=0 and train_text=false": (
                self.text_embeddings == "teacher" and (self.image_text > 0 or self.train_text)
            ),
            "teacher is for the distillation: give distillation a weight or leave teacher empty": (
                bool(self.teacher) and self.distillation <= 0
            ),
            f"memory, lr_reference_batch_size, temperature and shuffle_shards must be at least 0, max_grid "
            f"at least 1; found {self.memory}, {self.lr_reference_batch_size}, {self.temperature:g}, "
            f"{self.shuffle_shards} and {self.max_grid}": (
                min(self.memory, self.lr_reference_batch_size, self.temperature, self.shuffle_shards) < 0
                or self.max_grid < 1
            ),
        }
        for message, holds in faults.items():
            if holds:
                raise InputError(message)


def freeze(visual: ModifiedResNet | VisionTransformer, stages: int, batch_norm: bool) -> None:
    """Freezes the first `stages` stages of a ResNet (stem, layer1 to 3, head), and batch norms if asked.

    Raises:
        InputError: stages of a tower that has none, or more than there are.
    """
    if batch_norm:
        freeze_batch_norm(visual)
    if stages and not visual.freezable:
        raise InputError("freeze_stages is for ResNet towers; set it to 0 for a ViT")
    if not 0 <= stages <= len(visual.freezable):
        raise InputError(f"freeze_stages must be 0 to {len(visual.freezable)}, found {stages}")
    for name in (name for stage in visual.freezable[:stages] for name in stage):
        getattr(visual, name).requires_grad_(False)


class RegionTextTask(nn.Module):
    """Teaches a CLIP's vision tower to embed regions like their concepts, or like their crops.

    Args:
        model: the student; trained in place.
        vocabulary: the pool that the regions' concept ids mean; None for a loss over crops alone.
        config: weights of the losses, temperature, what is frozen.
        teacher: names regions within the step; None: the concepts stored with them count.
        synonyms: lists of names of one thing, see `concept_groups`.
        region_head: how a ResNet student embeds regions, one of `REGION_HEADS`.
    """

    concepts: Tensor
    families: Tensor
    prompts: Tensor
    fixed_scale: Tensor

    def __init__(
        self,
        model: CLIP,
        vocabulary: Vocabulary | None,
        config: RegionPretrainConfig,
        teacher: Teacher | None = None,
        synonyms: Sequence[Sequence[str]] = (),
        region_head: str = PerRegionHead.kind,
    ) -> None:
        super().__init__()
        self.model, self.config, self.teacher = model, config, teacher
        # Neither is part of this module: they are not trained, and no checkpoint holds them.
        self.crops = (
            RegionEncoder(frozen(copy.deepcopy(model.visual)), "crop", 1.0)
            if config.crop_distillation
            else None
        )
        self.encoder = RegionEncoder.of_maps(model.visual, otherwise="dense", region_head=region_head)
        self.encoder.check_padding(config.resize.multiple)
        freeze(model.visual, config.freeze_stages, config.freeze_batch_norm)
        if not isinstance(model, ImageTower):
            model.text.requires_grad_(config.train_text)
        if config.temperature and config.learn_temperature:
            nn.init.constant_(model.logit_scale, -math.log(config.temperature))
        model.logit_scale.requires_grad_(config.learn_temperature)
        scale = 1 / config.temperature if config.temperature else model.logit_scale.detach().exp()
        self.register_buffer("fixed_scale", torch.as_tensor(scale), persistent=False)
        self.region_text = build_plugin(REGION_TEXT, config.region_text) if config.contrastive else None
        self.memory = CrossBatchMemory(config.memory, model.config.embed_dim)
        if vocabulary is not None:
            self.register_buffer("concepts", vocabulary.embeddings, persistent=False)  # [C, D]
            self.register_buffer("families", concept_groups(vocabulary.names, synonyms), persistent=False)
        if vocabulary is not None and config.train_text:
            tokens = prompts(vocabulary, model.config.text.context_length)
            self.register_buffer("prompts", tokens, persistent=False)

    def forward(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Returns the weighted losses that have a weight.

        Over several processes each loss is this process's share times their number: the mean is the loss of
        the whole batch, however the regions are spread.
        """
        images, config = batch.images, self.config
        regions = Regions(batch.regions.boxes, batch.regions.image_index)
        # Whole images go the way of regions, and with them: one pass over the map for both.
        whole = [whole_images(images)] if config.image_text else []
        both = self.encoder(images, Regions.cat([regions, *whole]))
        embeddings, image_embeddings = both[: len(regions)], both[len(regions) :]  # [n, D], [B, D] or [0, D]
        counts = distributed.row_counts(embeddings)
        per_region = distributed.world() / max(sum(counts), 1)
        losses = {}
        if config.distillation:
            loss = self._distillation(batch, embeddings)
            losses["distillation"] = config.distillation * per_region * loss
        if config.contrastive:
            losses["region_text"] = config.contrastive * self._region_text(batch, embeddings, counts)
        if config.image_text:
            assert batch.tokens is not None
            losses["image_text"] = config.image_text * self._image_text(image_embeddings, batch.tokens)
        if self.crops is not None:
            targets = seen_by(self.crops, images, regions)
            losses["crops"] = config.crop_distillation * per_region * cosine_distance(embeddings, targets)
        return losses

    def scale(self) -> Tensor:
        """Returns the factor on the cosines, 1 / temperature."""
        return self.model.logit_scale.exp() if self.config.learn_temperature else self.fixed_scale

    def _distillation(self, batch: RegionBatch, embeddings: Tensor) -> Tensor:
        ids, probs = batch.regions.concept_ids, batch.regions.concept_probs  # [n, K]
        if self.teacher is not None:
            seen = seen_by(self.teacher.encoder, batch.images, batch.regions)  # [n, D]
        with torch.autocast(embeddings.device.type, enabled=False):
            if self.teacher is not None:
                own = self.teacher.concepts
                pool = self.concepts if own is None else own.to(seen.device)  # [C, D]
                probs = self.teacher.score.probabilities(seen @ pool.T)  # [n, C]
                ids = torch.arange(len(self.concepts), device=probs.device).expand_as(probs)
            assert ids is not None
            assert probs is not None
            return distillation(self.scale() * embeddings @ self.concepts.T, ids, probs)

    def _region_text(self, batch: RegionBatch, embeddings: Tensor, counts: list[int]) -> Tensor:
        assert batch.regions.concept_ids is not None
        assert self.region_text is not None
        ids = batch.regions.concept_ids[:, 0].contiguous()
        soft = self._soft_names(batch.regions, counts)
        named = RegionTextBatch.gathered(embeddings, ids, counts, self.memory, self.families, soft)
        texts = self._texts(named.present)
        with torch.autocast(embeddings.device.type, enabled=False):
            loss: Tensor = self.region_text(named, texts, self.scale())
        if self.training:
            self.memory.push(named.all_regions.detach(), named.all_concepts)
        return loss

    def _soft_names(self, regions: Regions, counts: list[int]) -> SoftNames | None:
        """Returns all that the teacher said of the regions, for a loss that reads it."""
        if not getattr(self.region_text, "needs_names", False):
            return None
        ids, probs, weights = regions.concept_ids, regions.concept_probs, None
        assert ids is not None
        assert probs is not None
        if getattr(self.region_text, "needs_weights", False):
            assert regions.scores is not None
            weights = probs[:, 0] * regions.scores  # how sure the phrase and its place are
        return SoftNames.gathered(ids, probs, regions.image_index, weights, counts)

    def _texts(self, present: Tensor) -> Tensor:
        """Returns [P, D], unit length, of concepts that all processes hold alike."""
        if not self.config.train_text:
            return self.concepts[present]
        # Each process embeds its share of them.
        mine = self.prompts[local_shard(present)]  # [p, K, T]
        encoded = F.normalize(self.model.encode_text(mine.flatten(0, 1)).float(), dim=-1)
        texts = F.normalize(encoded.view(*mine.shape[:2], encoded.shape[-1]).mean(1), dim=-1)  # [p, D]
        return distributed.gather(texts, distributed.row_counts(texts))

    def _image_text(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns the contrastive loss of [B, D] images; rows of [B, T] are 0 where one has no caption."""
        with torch.set_grad_enabled(self.config.train_text):
            texts = F.normalize(self.model.encode_text(tokens).float(), dim=-1)  # [B, D]
        captioned = tokens.any(1)
        images, texts = images[captioned], texts[captioned]
        counts = distributed.row_counts(images)
        first, total = sum(counts[: distributed.rank()]), sum(counts)
        with torch.autocast(images.device.type, enabled=False):
            by_image = row_entropy(first, images, distributed.gather(texts, counts), self.scale())
            by_text = row_entropy(first, texts, distributed.gather(images, counts), self.scale())
        return distributed.world() * (by_image + by_text) / (2 * max(total, 1))

    def log_scalars(self) -> dict[str, float]:
        """Returns what the log shows beside the losses: what is learned of temperature, scale and bias."""
        figures = {"logit_scale": float(self.scale().detach())} if self.config.learn_temperature else {}
        if isinstance(self.region_text, SigmoidRegionText):
            figures["region_text_scale"] = float(self.region_text.log_scale.detach().exp())
            figures["bias"] = float(self.region_text.bias.detach())
        return figures

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps a learned temperature in its published range."""
        if self.config.learn_temperature:
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def prompts(vocabulary: Vocabulary, context: int) -> Tensor:
    """Returns the tokens [C, K, T] that a vocabulary's embeddings were made of."""
    if "templates" not in vocabulary.provenance:
        raise InputError("the mined vocabulary has no prompts; mine again, or set train_text=false")
    templates: list[str] = json.loads(vocabulary.provenance["templates"])
    texts = [fill(template, name) for name in vocabulary.names for template in templates]
    return Tokenizer(context)(texts, truncate=True).view(len(vocabulary), len(templates), context)
