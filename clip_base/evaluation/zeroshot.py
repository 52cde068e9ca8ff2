"""The job `zeroshot`: images into classes known by their names alone (arXiv 2103.00020, section 3.1)."""

# B images in a batch, C classes, D embedding size
from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_base.config import REQUIRED, option
from clip_base.data.images import decode, normalise
from clip_base.errors import InputError
from clip_base.evaluation.pictures import Picture, batches, coco_pictures, folder_pictures, load_picture
from clip_base.evaluation.prompts import classifier, read_templates
from clip_base.evaluation.tables import print_classes, summarise, to_csv
from clip_base.files import write_text
from clip_base.models.clip import CLIP
from clip_base.models.configs import ACTIVATIONS
from clip_base.preprocess import Preprocess
from clip_base.progress import Progress
from clip_base.run import RunFolder
from clip_base.train import autocast, pick_device
from clip_base.weights.load import load_clip


@dataclass
class ZeroshotConfig:
    """Options of zero-shot classification."""

    weights: str = option(REQUIRED, "weights in any known form, or a published model's name")
    images: str = option(
        REQUIRED, "folder with a subfolder of images for each class; with annotations: of images"
    )
    out: str = option(REQUIRED, "folder for metrics and tables", free=True)
    annotations: str = option(
        "", "COCO instances file: its boxes are cut out and classified by its categories"
    )
    names: list[str] = option(
        [],
        "class names in the order of the sorted subfolders, or one file with a name a line; default: theirs",
    )
    templates: str = option(
        "published", "published (CLIP's 80 prompts), simple (one), or a file with one a line"
    )
    activation: str = option("", "activation of weights that do not say it", choices=("", *ACTIVATIONS))
    batch_size: int = option(64, "images embedded at once", free=True)
    workers: int = option(2, "threads that decode images", free=True)
    precision: str = option(
        "auto", "of the computation; auto: as the processor likes", choices=("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto takes a GPU when there is one", free=True)
    max_broken: float = option(0.1, "share of unusable images above which the run stops")

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 1:
            raise InputError("batch_size and workers must be at least 1")
        if not 0 <= self.max_broken <= 1:
            raise InputError(f"max_broken must lie in [0, 1], found {self.max_broken}")


def zeroshot(config: ZeroshotConfig) -> None:
    """Classifies images by class names alone; leaves metrics.json, per_class.csv and skipped.jsonl."""
    run = RunFolder(config.out, config, "zeroshot")
    done = run.finished()
    if done is not None:
        print(f"{run.path} is complete: top1 {done['top1']:.4f}, top5 {done['top5']:.4f}")
        return
    if config.annotations:
        names, pictures = coco_pictures(config.annotations, config.images)
    else:
        names, pictures = folder_pictures(config.images)
    names = class_names(config.names, names)
    device = pick_device(config.device)
    model = load_clip(config.weights, config.activation).to(device)
    with autocast(config.precision, device):
        directions = classifier(model, names, read_templates(config.templates), config.batch_size)
        ranks, skipped = _ranks(model, directions, pictures, config, device)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
    write_text(run.path / "skipped.jsonl", lines)
    if len(skipped) > config.max_broken * len(pictures) or len(skipped) == len(pictures):
        raise InputError(
            f"{len(skipped)} of {len(pictures)} images cannot be used, more than "
            f"max_broken={config.max_broken} (first: {skipped[0]['reason']}); all are listed in "
            f"{run.path / 'skipped.jsonl'}"
        )
    labels = torch.tensor([picture.label for picture in pictures])
    figures, classes = summarise(ranks, labels, names)
    write_text(run.path / "per_class.csv", to_csv(classes))
    run.finish({**figures, "skipped": len(skipped)})
    print_classes("zero-shot classification", figures, classes, len(skipped))


def class_names(given: Sequence[str], found: Sequence[str]) -> list[str]:
    """Returns the names to classify by: those given, in a list or a file, else those found with the images.

    Raises:
        InputError: there are more or fewer than classes, or one is empty.
    """
    names = list(given) or list(found)
    if len(given) == 1 and Path(given[0]).is_file():
        lines = Path(given[0]).read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    if len(names) != len(found):
        raise InputError(
            f"names gives {len(names)} names, the images have {len(found)} classes "
            f"({', '.join(found[:4])}{', …' if len(found) > 4 else ''}); give one a class, in that order"
        )
    if not all(name.strip() for name in names):
        raise InputError("names has an empty class name")
    return names


@torch.inference_mode()
def _ranks(
    model: CLIP, directions: Tensor, pictures: list[Picture], config: ZeroshotConfig, device: torch.device
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Returns [N] int64, how many classes score above the true one (-1: unusable), and what is unusable."""
    ranks = torch.full((len(pictures),), -1)
    skipped: list[dict[str, Any]] = []
    preprocess = Preprocess(model.visual.resolution)
    load = functools.partial(
        load_picture,
        functools.lru_cache(4 * config.workers)(decode),
        lambda pixels: preprocess.pixels(Image.fromarray(pixels)),
    )
    start = 0
    with Progress("zero-shot images", len(pictures)) as progress:
        for loaded in batches(pictures, load, config.batch_size, config.workers):
            kept = [start + offset for offset, item in enumerate(loaded) if isinstance(item, Tensor)]
            for offset, item in enumerate(loaded):
                if isinstance(item, str):
                    picture = pictures[start + offset]
                    skipped.append({"image": str(picture.path), "box": picture.box, "reason": item})
            if kept:
                pixels = torch.stack([item for item in loaded if isinstance(item, Tensor)]).to(
                    device
                )  # [B, 3, R, R]
                features = F.normalize(model.encode_image(normalise(pixels)).float(), dim=-1)
                with torch.autocast(device.type, enabled=False):
                    scores = features @ directions.T  # [B, C]
                truth = torch.tensor([pictures[index].label for index in kept], device=device)
                above = scores > scores.gather(1, truth[:, None])
                ranks[kept] = above.sum(1).cpu()
            start += len(loaded)
            progress.advance(len(loaded))
    return ranks, skipped
