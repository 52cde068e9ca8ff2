"""The job `zeroshot`: classification of images by class names alone (arXiv 2103.00020, section 3.1)."""

# C classes, D embedding size
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from clip_base.data.coco import annotation_inputs
from clip_base.evaluation.datasets import beside_tars, coco_images, folder_images
from clip_base.evaluation.features import Embedder, FeatureConfig, note_skipped
from clip_base.evaluation.likelihood import LikelihoodEmbedder
from clip_base.evaluation.prompts import classifier, read_templates
from clip_base.evaluation.ranking import ranks_of_best, ranks_of_classes
from clip_base.evaluation.tables import print_classes, summarize, to_csv
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.jobs.skipped import require_present
from clip_base.runtime.errors import InputError, note
from clip_base.runtime.precision import autocast
from clip_base.storage.files import is_file, read_text, write_text
from clip_base.storage.tables import CLASS_FILES, read_class_list
from clip_base.weights.load import find, weight_files
from clip_base.weights.predictors import is_predictor


@everyday(
    "zeroshot images=imagenet/val weights=RN50 out=runs/zeroshot",
    input="images annotations names",
    output="out",
    model="weights templates",
    speed="batch_size workers device",
)
@dataclass
class ZeroshotConfig(FeatureConfig):
    """Options of zero-shot classification."""

    images: str = option(
        REQUIRED,
        "folder with a subfolder of images for each class, or a dataset of CLIP_benchmark (wds_*); with "
        "annotations: of images",
    )
    annotations: str = option("", "COCO instances file: boxes are cropped and classified into its categories")
    names: list[str] = option(
        [],
        "class names in the order of the sorted subfolders (numbered ones: of the numbers), or one file of "
        "them: one per line, JSON, YAML or CSV; empty: the subfolders' names",
    )
    templates: str = option(
        "published", "published (CLIP's 80 prompts), simple (one), or a file with one per line"
    )


def zeroshot(config: ZeroshotConfig) -> None:
    """Classifies images by class names alone; writes metrics.json, per_class.csv and skipped.jsonl."""
    inputs = {**weight_files(config, "weights"), **annotation_inputs(config, "annotations")}
    inputs |= files_of(config, "names", "templates")
    run = RunFolder(config.out, config, "zeroshot", inputs)
    done = run.finished()
    if done is not None:
        print(f"{run.path} is complete: top1 {done['top1']:.4f}, top5 {done['top5']:.4f}")
        return
    if config.annotations:
        names, examples = coco_images(config.annotations, config.images)
        require_present([example.path for example in examples], config.max_skipped, "images")
    else:
        names, examples = folder_images(config.images)
    names = class_names(config.names, names)
    templates = read_templates(config.templates)
    own = beside_tars(Path(config.images), "zeroshot_classification_templates.txt")
    if own.exists() and config.templates == "published":
        note(f"the prompts are CLIP's 80; templates={own} uses the dataset's own, as CLIP_benchmark does")
    labels = torch.tensor([example.label for example in examples])
    ranks = torch.full((len(examples),), -1)  # -1: unusable
    if is_predictor(find(config.weights)):
        found = LikelihoodEmbedder(config, run.path, names, templates)(examples, "zero-shot images")
        right = F.one_hot(labels[found.kept], len(names)).bool()
        ranks[found.kept] = ranks_of_best(found.values, right)
    else:
        embed = Embedder(config, run.path)
        # Names first: that one is too long for its prompt shows before all images are embedded.
        with autocast(config.precision, embed.device):
            directions = classifier(embed.model, names, templates, config.batch_size)  # [C, D]
        embed.require_finite(directions, "class names")
        found = embed(examples, "zero-shot images")
        ranks[found.kept] = ranks_of_classes(found.values, directions.cpu(), labels[found.kept])
    note_skipped(found.skipped, len(examples), config.max_skipped, run.path / "skipped.jsonl")
    figures, classes = summarize(ranks, labels, names)
    write_text(run.path / "per_class.csv", to_csv(classes))
    run.finish({**figures, "skipped": len(found.skipped)})
    print_classes("zero-shot classification", figures, classes, len(found.skipped))


def names_in(path: str) -> list[str]:
    """Returns the names in a file: whole lines, or those of a kind that `read_class_list` parses."""
    if Path(path).suffix.lower() in CLASS_FILES[2:]:
        return [name for name, *_ in read_class_list(path, "class names")]
    return [line.strip() for line in read_text(path, "class names").splitlines() if line.strip()]


def class_names(given: Sequence[str], found: Sequence[str]) -> list[str]:
    """Returns the names to classify by: those given, in a list or a file, else those found with the images.

    Raises:
        InputError: there are more or fewer than classes, or one is empty.
    """
    names = list(given) or list(found)
    if len(given) == 1 and is_file(given[0]):
        names = names_in(given[0])
    if len(names) != len(found):
        raise InputError(
            f"names gives {len(names)} names, the images have {len(found)} classes "
            f"({', '.join(found[:4])}{', …' if len(found) > 4 else ''}); give one per class, in that order"
        )
    if not all(name.strip() for name in names):
        raise InputError("names has an empty class name")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        shown = f"{', '.join(map(repr, repeated[:5]))}{', …' if len(repeated) > 5 else ''}"
        note(
            f"{shown}: these names belong to more than one class; such classes cannot be told apart, so "
            "that none of their images counts as correct in top1"
        )
    return names
