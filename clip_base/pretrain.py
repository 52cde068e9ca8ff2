"""Contrastive image-text pretraining from raw captions (arXiv 2103.00020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base import plugins
from clip_base.batch import ImageBatch, ImageTextBatch
from clip_base.config import REQUIRED, Part, option, part
from clip_base.data.images import ImageStore, Pixels, normalise, resize, to_tensor
from clip_base.data.loader import Loader
from clip_base.data.sources import SOURCES, Pair, Source
from clip_base.errors import InputError
from clip_base.losses import contrastive, equal_rows
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig
from clip_base.run import RunFolder
from clip_base.tokenizer import Tokenizer
from clip_base.train import TrainConfig, fit
from clip_base.weights import load_clip
from clip_base.weights.native import save_clip

MAX_LOGIT_SCALE = math.log(100)  # arXiv 2103.00020, section 2.5


@dataclass
class PretrainConfig:
    """Options of contrastive pretraining."""

    out: str = option(REQUIRED, "folder for weights, log and metrics", free=True)
    source: Part = part(SOURCES, "coco", "where image-text pairs come from")
    model: str = option("", "a published tower by name, such as RN50; empty: the sizes under `tower`")
    tower: CLIPConfig = option(CLIPConfig(), "sizes of the towers when `model` is empty")
    init: str = option("", "weights file to start from; empty: random weights from train.seed")
    crop: float = option(0.9, "side of the smallest random square crop, as a share of the short side")
    merge_equal: bool = option(True, "equal captions in a batch are each other's positives instead of negatives")
    cache: bool = option(False, "keep decoded images in memory (for small data sets)", free=True)
    train: TrainConfig = option(TrainConfig(epochs=32), "the training loop")

    def __post_init__(self) -> None:
        if not 0.1 <= self.crop <= 1:
            raise InputError(f"crop must lie in [0.1, 1], found {self.crop}")


class CaptionedImages:
    """Pairs as training samples: a random square crop and one caption drawn at random.

    Args:
        pairs: images and their captions.
        tokenizer: turns a caption into ids; too long ones are cut.
        resolution: side of the crop in pixels after resizing.
        crop: smallest side of the crop as a share of the image's short side.
        cache: keep decoded images in memory.
    """

    def __init__(
        self, pairs: list[Pair], tokenizer: Tokenizer, resolution: int, crop: float, cache: bool
    ) -> None:
        self.pairs, self.tokenizer, self.resolution, self.crop = pairs, tokenizer, resolution, crop
        self.store = ImageStore(math.ceil(resolution / crop) if cache else 0, keep=cache)

    def __len__(self) -> int:
        return len(self.pairs)

    def item(self, index: int, generator: torch.Generator) -> tuple[Pixels, str]:
        """Returns an [R, R, 3] crop and a caption."""
        pair = self.pairs[index]
        image = self.store(pair.image)
        height, width = image.shape[:2]
        share, down, right, which = torch.rand(4, generator=generator).tolist()
        side = max(round(min(height, width) * (self.crop + (1 - self.crop) * share)), 1)
        top, left = round(down * (height - side)), round(right * (width - side))
        piece = resize(image[top : top + side, left : left + side], self.resolution, self.resolution)
        return piece, pair.captions[int(which * len(pair.captions))]

    def collate(self, items: list[tuple[Pixels, str]]) -> ImageTextBatch:
        """Makes a batch of crops and captions."""
        pixels = normalise(to_tensor([image for image, _ in items]))
        return ImageTextBatch(ImageBatch.whole(pixels), self.tokenizer([text for _, text in items], truncate=True))


class ContrastiveTask(nn.Module):
    """CLIP's training task.

    Args:
        model: trained in place.
        merge_equal: equal captions in a batch count as each other's positives.
    """

    def __init__(self, model: CLIP, merge_equal: bool = True) -> None:
        super().__init__()
        self.model, self.merge_equal = model, merge_equal

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Returns the symmetric contrastive loss of the batch."""
        images = F.normalize(self.model.encode_image(batch.images.pixels).float(), dim=-1)
        texts = F.normalize(self.model.encode_text(batch.tokens).float(), dim=-1)
        same = equal_rows(batch.tokens) if self.merge_equal else None
        with torch.autocast(images.device.type, enabled=False):
            return {"contrastive": contrastive(images, texts, self.model.logit_scale.exp(), same)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps the logit scale in its published range."""
        self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def make_model(config: PretrainConfig) -> CLIP:
    """Returns the model to train: published sizes or `tower`, random or from `init`."""
    sizes = zoo.config(config.model) if config.model else config.tower
    torch.manual_seed(config.train.seed)
    if not config.init:
        return CLIP(sizes)
    model = load_clip(config.init)
    if model.config != sizes:
        raise InputError(f"init={config.init} holds {model.config}, asked for was {sizes}; set model= or tower= to fit")
    return model


def pretrain(config: PretrainConfig) -> None:
    """Trains a CLIP on image-text pairs; leaves `out/model.safetensors`."""
    run = RunFolder(config.out, config, "pretrain")
    if run.finished() is not None:
        print(f"{run.path} is complete: {run.path / 'model.safetensors'}")
        return
    source: Source = plugins.build(SOURCES, config.source)
    pairs = source.pairs()
    model = make_model(config)
    sizes = model.config
    data = CaptionedImages(
        pairs, Tokenizer(sizes.text.context_length), sizes.vision.resolution, config.crop, config.cache
    )
    train = config.train
    loader = Loader(
        data,
        data.collate,
        train.batch_size,
        seed=train.seed,
        workers=train.workers,
        skipped=run.path / "skipped.jsonl",
    )
    model.to(memory_format=torch.channels_last)
    steps = fit(ContrastiveTask(model, config.merge_equal), loader, train, run)
    save_clip(model, run.path / "model.safetensors")
    figures = {"steps": steps, "pairs": len(pairs), "skipped": len(loader.broken), "loss": last_loss(run.log_path)}
    run.finish(figures)
    print(f"{run.path / 'model.safetensors'}: {steps} steps on {len(pairs)} images, loss {figures['loss']:.3f}")


def last_loss(log: Path) -> float:
    """Returns the sum of the losses in the last line of a training log."""
    import json

    known = {"step", "lr", "images_per_second"}
    for line in reversed(log.read_text(encoding="utf-8").splitlines()):
        entry = json.loads(line)
        if "lr" in entry:
            return float(sum(value for key, value in entry.items() if key not in known))
    return math.nan
