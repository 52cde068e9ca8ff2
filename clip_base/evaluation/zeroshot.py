"""The job `zeroshot`: images into classes known by their names alone (arXiv 2103.00020, section 3.1)."""

# B images in a batch, C classes, D embedding size
from __future__ import annotations

import csv
import functools
import io
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from clip_base.config import REQUIRED, option
from clip_base.data.images import decode, normalise
from clip_base.errors import InputError
from clip_base.evaluation.prompts import classifier, read_templates
from clip_base.files import existing, read_json, write_text
from clip_base.models.clip import CLIP
from clip_base.models.configs import ACTIVATIONS
from clip_base.preprocess import Preprocess
from clip_base.progress import Progress
from clip_base.run import RunFolder
from clip_base.train import autocast, pick_device
from clip_base.weights.load import load_clip

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"}
_SHOWN = 40  # classes up to which the table lists all of them
_EXTREMES = 5  # classes at either end that it lists otherwise


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


@dataclass(frozen=True)
class Picture:
    """One image, or one box of it, and its class.

    Attributes:
        path: the image file.
        label: index of the class.
        box: (x, y, width, height) in pixels; None is the whole image.
    """

    path: Path
    label: int
    box: tuple[float, float, float, float] | None = None


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
    write_text(run.path / "per_class.csv", _csv(classes))
    run.finish({**figures, "skipped": len(skipped)})
    _print(figures, classes, len(skipped))


def folder_pictures(folder: str) -> tuple[list[str], list[Picture]]:
    """Returns the subfolders' names, sorted, `_` as a space, and the images in them.

    Raises:
        InputError: the folder is missing, or holds no subfolders with images.
    """
    root = existing(folder, "image folder")
    subfolders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    pictures = [
        Picture(path, label)
        for label, subfolder in enumerate(subfolders)
        for path in sorted(subfolder.rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not pictures:
        raise InputError(
            f"{folder} holds no images in subfolders; put each class's images into a folder of its name, "
            "or give annotations=FILE in COCO's form"
        )
    return [path.name.replace("_", " ") for path in subfolders], pictures


def coco_pictures(annotations: str, images: str) -> tuple[list[str], list[Picture]]:
    """Returns the categories of a COCO instances file, by id, and the boxes of its single objects.

    Raises:
        InputError: the file is no such file, or an annotation names an image or category that it does not
            list.
    """
    content, folder = read_json(annotations, "annotations"), existing(images, "image folder")
    try:
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        path_of = {image["id"]: folder / str(image["file_name"]) for image in content["images"]}
        pictures = [
            Picture(path_of[entry["image_id"]], label_of[entry["category_id"]], _box(entry["bbox"]))
            for entry in content["annotations"]
            if not entry.get("iscrowd")
        ]
        names = [str(category["name"]) for category in categories]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{annotations} is no COCO instances file: {type(error).__name__} at {error}; it needs images, "
            "categories and annotations with image_id, category_id and bbox"
        ) from None
    if not pictures:
        raise InputError(f"{annotations} holds no boxes of single objects")
    return names, sorted(pictures, key=lambda picture: picture.path)


def _box(values: Any) -> tuple[float, float, float, float]:
    x, y, width, height = (float(value) for value in values)
    return x, y, width, height


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
    load = functools.partial(
        _load, functools.lru_cache(4 * config.workers)(decode), Preprocess(model.visual.resolution)
    )
    start = 0
    with Progress("zero-shot images", len(pictures)) as progress:
        for loaded in _batches(pictures, load, config.batch_size, config.workers):
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


def _batches(
    pictures: list[Picture], load: Callable[[Picture], Tensor | str], size: int, workers: int
) -> Iterator[list[Tensor | str]]:
    """Yields loaded batches in order; the next one is loading meanwhile."""
    waiting: deque[Iterator[Tensor | str]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pictures), size):
            waiting.append(pool.map(load, pictures[start : start + size]))
            if len(waiting) > 1:
                yield list(waiting.popleft())
        while waiting:
            yield list(waiting.popleft())


def _load(decode: Callable[[Path], Any], preprocess: Preprocess, picture: Picture) -> Tensor | str:
    """Returns [3, R, R] uint8, or why the picture cannot be used."""
    try:
        pixels = decode(picture.path)  # [H, W, 3]
    except InputError as error:
        return str(error)
    if picture.box is not None:
        x, y, width, height = picture.box
        if not all(math.isfinite(value) for value in picture.box):
            return f"box {picture.box} is not finite"
        top, left = max(math.floor(y), 0), max(math.floor(x), 0)
        pixels = pixels[top : max(math.ceil(y + height), 0), left : max(math.ceil(x + width), 0)]
        if width <= 0 or height <= 0 or not pixels.size:
            return f"box {picture.box} holds no pixels of the image"
    return preprocess.pixels(Image.fromarray(pixels))


def summarise(
    ranks: Tensor, labels: Tensor, names: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the figures over all pictures, and those of each class.

    Args:
        ranks: [N] int64, how many classes score above the true one; -1 is left out.
        labels: [N] int64, the true class.
        names: C class names.

    Returns:
        `top1`, `top5` (shares of pictures), `mean_per_class` (mean of the classes' top1), `images`,
        `classes`; and for each class `class`, `name`, `images`, `top1`, `top5` (None without pictures).
    """
    used = ranks >= 0
    ranks, labels = ranks[used], labels[used]
    classes: list[dict[str, Any]] = []
    for label, name in enumerate(names):
        own = ranks[labels == label]
        top1, top5 = (float((own < k).float().mean()) if len(own) else None for k in (1, 5))
        classes.append({"class": label, "name": name, "images": len(own), "top1": top1, "top5": top5})
    seen = [entry["top1"] for entry in classes if entry["top1"] is not None]
    figures = {
        "top1": float((ranks < 1).double().mean()),
        "top5": float((ranks < 5).double().mean()),
        "mean_per_class": sum(seen) / len(seen),
        "images": len(ranks),
        "classes": len(names),
    }
    return figures, classes


def _csv(classes: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["class", "name", "images", "top1", "top5"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(classes)
    return text.getvalue()


def _print(figures: dict[str, Any], classes: list[dict[str, Any]], skipped: int) -> None:
    """Prints all classes, or the best and the worst of many, and the figures over all of them."""
    ranked = sorted((entry for entry in classes if entry["images"]), key=lambda entry: -entry["top1"])
    table = Table(title="zero-shot classification", title_justify="left")
    for column in ("class", "images", "top 1", "top 5"):
        table.add_column(column, justify="left" if column == "class" else "right")
    shown = ranked if len(ranked) <= _SHOWN else [*ranked[:_EXTREMES], None, *ranked[-_EXTREMES:]]
    for entry in shown:
        if entry is None:
            table.add_row("…", "", "", "")
        else:
            table.add_row(entry["name"], str(entry["images"]), f"{entry['top1']:.1%}", f"{entry['top5']:.1%}")
    table.add_section()
    table.add_row("all", str(figures["images"]), f"{figures['top1']:.1%}", f"{figures['top5']:.1%}")
    table.add_row("mean of classes", "", f"{figures['mean_per_class']:.1%}", "")
    console = Console(highlight=False, markup=False)
    console.print(table)
    if skipped:
        console.print(f"{skipped} unusable images are listed in skipped.jsonl")
