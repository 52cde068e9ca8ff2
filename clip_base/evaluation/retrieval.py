"""The job `retrieval`: images by their captions and captions by their images."""

# I images, T texts, D embedding size
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from clip_base.data.coco import read_captions
from clip_base.evaluation import ranking
from clip_base.evaluation.datasets import EvaluationImage, shard_captions
from clip_base.evaluation.features import Embedder, FeatureConfig, note_skipped
from clip_base.evaluation.ranking import Answers, ranks_of_best, ranks_of_classes
from clip_base.evaluation.tables import to_csv
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.jobs.skipped import MAX_SKIPPED, require_present
from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast
from clip_base.runtime.progress import track
from clip_base.storage.files import existing, write_text
from clip_base.storage.paths import image_in
from clip_base.weights.load import weight_files

KS = (1, 5, 10)
_DIRECTIONS = ("image_to_text", "text_to_image")


@everyday(
    "retrieval captions=captions_val2017.json images=val2017 weights=RN50 out=runs/retrieval",
    input="captions images captions_per_image",
    output="out",
    model="weights prompt",
    speed="batch_size workers device",
)
@dataclass
class RetrievalConfig(FeatureConfig):
    """Options of retrieval on captioned images."""

    captions: str = option(
        REQUIRED, "captions_*.json in COCO's format, or a folder of webdataset tars (CLIP_benchmark's wds_*)"
    )
    images: str = option("", "folder that COCO's file names are relative to; tars hold their images")
    captions_per_image: int = option(5, "number of captions used per image, from the first; 0: all")
    prompt: str = option("{}", "prompt template; {} is the caption")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.prompt:
            raise InputError(f"prompt {self.prompt!r} has no {{}} where the caption goes")


def retrieval(config: RetrievalConfig) -> None:
    """Evaluates image-text retrieval both ways; writes metrics.json, per_query.csv and skipped.jsonl."""
    inputs = {**weight_files(config, "weights"), **files_of(config, "captions")}
    run = RunFolder(config.out, config, "retrieval", inputs)
    done = run.finished()
    if done is not None:
        _print(done)
        return
    examples, captions, unread = captioned(config)
    embed = Embedder(config, run.path)
    found = embed(examples, "images")
    skipped = unread + found.skipped
    note_skipped(skipped, len(examples) + len(unread), config.max_skipped, run.path / "skipped.jsonl")
    limit = config.captions_per_image or None
    texts: list[str] = []
    owners: list[int] = []
    for row, index in enumerate(found.kept.tolist()):
        own = captions[index][:limit]
        texts += own
        owners += [row] * len(own)
    owner = torch.tensor(owners)
    prompts = [config.prompt.replace("{}", text) for text in texts]
    with autocast(config.precision, embed.device):
        text_features = embed_texts(embed.model, prompts, config.batch_size)
    embed.require_finite(text_features, "captions")
    images = F.normalize(found.values, dim=-1)
    ranks = ranks_of(images, text_features, owner)
    files = [Path(str(examples[index].path)).name for index in found.kept.tolist()]
    write_text(run.path / "per_query.csv", to_csv(_queries(ranks, files, texts, owners)))
    figures = {
        **recalls(ranks, KS),
        "median_rank_image_to_text": float(ranks[0].double().quantile(0.5)) + 1,
        "median_rank_text_to_image": float(ranks[1].double().quantile(0.5)) + 1,
        "images": len(images),
        "texts": len(texts),
        "skipped": len(skipped),
    }
    run.finish(figures)
    _print(figures)


def captioned(
    config: RetrievalConfig,
) -> tuple[list[EvaluationImage], Sequence[Sequence[str]], list[dict[str, Any]]]:
    """Returns the images, the captions of each, and what cannot be read, with the reason.

    Raises:
        InputError: there are no captions, or no images folder.
    """
    if Path(config.captions).is_dir():
        if config.images:
            raise InputError(
                f"captions={config.captions} is a folder of tars, which contain images; omit images="
            )
        return shard_captions(Path(config.captions))
    if not config.images:
        raise InputError("images= is missing: the folder that the file names in captions= are relative to")
    folder = existing(config.images, "images folder")
    captions, names = read_captions(config.captions)
    if not captions:
        raise InputError(f"captions file {config.captions} holds no captions")
    keys = sorted(captions)
    where = f"captions file {config.captions}"
    images = [EvaluationImage(image_in(folder, names[key], where), 0) for key in keys]
    require_present([image.path for image in images], MAX_SKIPPED, where)
    return images, [captions[key] for key in keys], []


def recall_at(
    image_features: Tensor, text_features: Tensor, owner: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Returns the share of queries with a right answer among the k nearest, both ways.

    Args:
        image_features: [I, D], unit length.
        text_features: [T, D], unit length.
        owner: [T] int64, the image that each text belongs to. An image without texts is no query.
        ks: how many answers are looked at.

    Returns:
        `image_to_text_R@k` (any of the image's own texts counts) and `text_to_image_R@k` for each k.
    """
    return recalls(ranks_of(image_features, text_features, owner), ks)


def recalls(ranks: tuple[Tensor, Tensor], ks: Sequence[int]) -> dict[str, float]:
    """Returns `image_to_text_R@k` and `text_to_image_R@k` of the ranks that `ranks_of` returns."""
    return {
        f"{direction}_R@{k}": float((own < k).double().mean())
        for direction, own in zip(_DIRECTIONS, ranks, strict=True)
        for k in ks
    }


def ranks_of(image_features: Tensor, text_features: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many wrong answers come before the first right one, for each image and for each text.

    Equal scores count against the right one, see `ranking`: features that are all alike find nothing.

    Returns:
        [I'] int64 over the images that own texts, in order, and [T] int64.
    """
    if owner.shape != (len(text_features),):
        raise ValueError(f"owner must be [{len(text_features)}], one per text, got {list(owner.shape)}")
    owner = owner.to(image_features.device)
    with torch.autocast(image_features.device.type, enabled=False):
        queries, texts = torch.unique(owner), Answers(text_features)  # sorted
        from_images = []
        for part in queries.split(ranking.ROWS):
            right = owner[None] == part[:, None]  # [b, T]
            from_images.append(ranks_of_best(texts.scores(image_features[part]), right))
        from_texts = ranks_of_classes(text_features, image_features, owner)
    return torch.cat(from_images).cpu(), from_texts.cpu()


@torch.no_grad()
def embed_texts(model: CLIP, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Returns [T, D] float32 unit-length embeddings on the CPU; texts that are too long are cut."""
    tokenizer, device = Tokenizer(model.config.text.context_length), model.logit_scale.device
    distinct = list(dict.fromkeys(texts))  # equal texts get equal embeddings, whatever batch they are in
    parts = []
    for start in track(range(0, len(distinct), batch_size), "captions"):
        tokens = tokenizer(distinct[start : start + batch_size], truncate=True).to(device)
        parts.append(F.normalize(model.encode_text(tokens).float(), dim=-1).cpu())
    place = {text: row for row, text in enumerate(distinct)}
    return torch.cat(parts)[[place[text] for text in texts]]


def _queries(
    ranks: tuple[Tensor, Tensor], files: list[str], texts: list[str], owners: list[int]
) -> list[dict[str, Any]]:
    """Returns one row per query: the rank of its first right answer, counted from 1."""
    of_image = [
        {"direction": _DIRECTIONS[0], "image": files[row], "caption": "", "rank": rank + 1}
        for row, rank in zip(sorted(set(owners)), ranks[0].tolist(), strict=True)
    ]
    of_text = [
        {"direction": _DIRECTIONS[1], "image": files[row], "caption": text, "rank": rank + 1}
        for text, row, rank in zip(texts, owners, ranks[1].tolist(), strict=True)
    ]
    return of_image + of_text


def _print(figures: dict[str, Any]) -> None:
    table = Table(title=f"retrieval: {figures['images']} images, {figures['texts']} captions")
    for column in ("", *(f"R@{k}" for k in KS), "median rank"):
        table.add_column(column, justify="right" if column else "left")
    for direction in _DIRECTIONS:
        shares = [f"{figures[f'{direction}_R@{k}']:.1%}" for k in KS]
        table.add_row(direction.replace("_", " "), *shares, f"{figures[f'median_rank_{direction}']:g}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    if figures["skipped"]:
        console.print(f"{figures['skipped']} unusable images are listed in skipped.jsonl")
