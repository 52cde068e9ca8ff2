"""What is measured of one model on one dataset: zero-shot, linear probe, few shots, retrieval."""

# N test images, C classes, D embedding size
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_base.benchmark.datasets import BenchmarkDataset, Names
from clip_base.evaluation.datasets import EvaluationImage
from clip_base.evaluation.features import Embedder, FeatureConfig, Features
from clip_base.evaluation.linear_probe import (
    FewShotConfig,
    Fits,
    LabeledFeatures,
    by_shots,
    few_shot,
    fit,
    ranks_of,
    search,
    split,
)
from clip_base.evaluation.prompts import classifier
from clip_base.evaluation.ranking import ranks_of_classes
from clip_base.evaluation.retrieval import embed_texts, recalls
from clip_base.evaluation.retrieval import ranks_of as ranks_of_captions
from clip_base.evaluation.tables import summarize
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import JobError
from clip_base.runtime.precision import autocast

TASKS = ("zeroshot", "linear_probe", "few_shot", "retrieval")
_KS = (1, 5, 10)
Figures = dict[str, Any]


@dataclass(frozen=True)
class ProbeOptions:
    """How probes are trained.

    Attributes:
        shots: training images per class of few-shot probes.
        seeds: draws of each.
        seed: determines the draws and the validation split.
        validation: share of each class's training images on which C is chosen.
    """

    shots: tuple[int, ...]
    seeds: int
    seed: int
    validation: float


class Model:
    """A model with the features of its images, which are embedded once per dataset.

    Probes read what the vision tower has before its projection, zero-shot and retrieval what is behind it.

    Args:
        name: in the table.
        config: its weights and how to compute; `features` is where they are kept.

    Attributes:
        skipped: images that could not be used since it was emptied.
    """

    def __init__(self, name: str, config: FeatureConfig) -> None:
        self.name, self.config = name, config
        self.embed = Embedder(config, Path(config.out), "penultimate")
        self.skipped: list[dict[str, Any]] = []

    @property
    def clip(self) -> CLIP:
        """The model, read when it is first needed."""
        return self.embed.model

    def features(self, examples: list[EvaluationImage], what: str) -> Features:
        """Returns the features before the projection.

        Raises:
            JobError: no image can be used.
        """
        found = self.embed(examples, f"{self.name}: {what}")
        if not len(found.kept):
            raise JobError(f"{what}: no image can be used (first: {found.skipped[0]['reason']})")
        self.skipped += found.skipped
        return found

    @torch.no_grad()
    def projected(self, features: Tensor) -> Tensor:
        """Returns [N, D], what the vision tower makes of features before its projection."""
        projection = getattr(self.clip.visual, "proj", None)
        if not isinstance(projection, nn.Parameter):  # of a ResNet they are its output
            return features
        return features @ projection.float().cpu()

    def directions(self, names: Names, templates: Sequence[str]) -> Tensor:
        """Returns [C, D], unit length; the names of a class count alike."""
        flat = [name for own in names for name in own]
        with autocast(self.config.precision, self.embed.device):
            each = classifier(self.clip, flat, templates, self.config.batch_size).cpu()
        self.embed.require_finite(each, "class names")
        rows = iter(each)
        means = [torch.stack(list(itertools.islice(rows, len(own)))).mean(0) for own in names]
        return F.normalize(torch.stack(means), dim=1)


def measure(task: str, model: Model, dataset: BenchmarkDataset, options: ProbeOptions) -> Figures:
    """Returns the figures of a task; see `possible` for which there are.

    Raises:
        InputError: too few images for a probe, embeddings that are not finite.
    """
    if task == "zeroshot":
        return _zeroshot(model, dataset)
    if task == "retrieval":
        return _retrieval(model, dataset)
    train, test = (
        _labeled(model, examples, f"{dataset.name}, {part} images")
        for part, examples in (("train", dataset.train), ("test", dataset.test))
    )
    held, rest = split(train.labels, options.validation, options.seed)
    fits = Fits()
    if task == "few_shot":
        config = FewShotConfig(options.shots, options.seeds, options.seed)
        rows = few_shot(config, train.pick(rest), train.pick(held), test, fits)
        return {"shots": by_shots(rows)}
    c = search(train.pick(rest), train.pick(held), fits)
    figures, _ = summarize(
        ranks_of(fit(train, c, fits), test), torch.from_numpy(test.labels), _first(dataset)
    )
    return figures | {"C": c, "train_images": len(train)}


def shifted_probe(
    model: Model, dataset: BenchmarkDataset, shifted: BenchmarkDataset, options: ProbeOptions
) -> Figures:
    """Returns `top1` on a shifted dataset of the linear probe that was trained on the dataset itself."""
    train, test = (
        _labeled(model, examples, what)
        for examples, what in (
            (dataset.train, f"{dataset.name}, train images"),
            (shifted.test, f"{shifted.name}, test images"),
        )
    )
    held, rest = split(train.labels, options.validation, options.seed)
    fits = Fits()
    c = search(train.pick(rest), train.pick(held), fits)
    figures, _ = summarize(
        ranks_of(fit(train, c, fits), test), torch.from_numpy(test.labels), _first(shifted)
    )
    return figures | {"C": c}


def possible(dataset: BenchmarkDataset) -> tuple[str, ...]:
    """Returns the tasks that a dataset has what it takes for."""
    if dataset.captions:
        return ("retrieval",)
    return TASKS[:3] if dataset.train else TASKS[:1]


def _first(dataset: BenchmarkDataset) -> list[str]:
    return [names[0] for names in dataset.classes]


def _labeled(model: Model, examples: list[EvaluationImage], what: str) -> LabeledFeatures:
    found = model.features(examples, what)
    labels = np.array([examples[index].label for index in found.kept.tolist()], np.int64)
    return LabeledFeatures(found.values.numpy(), labels)


def _zeroshot(model: Model, dataset: BenchmarkDataset) -> Figures:
    directions = model.directions(dataset.classes, dataset.templates)
    found = model.features(dataset.test, f"{dataset.name}, test images")
    labels = torch.tensor([example.label for example in dataset.test])[found.kept]
    ranks = ranks_of_classes(model.projected(found.values), directions, labels)
    figures, _ = summarize(ranks, labels, _first(dataset))
    return figures | {"skipped": len(found.skipped)}


def _retrieval(model: Model, dataset: BenchmarkDataset) -> Figures:
    found = model.features(dataset.test, f"{dataset.name}, images")
    owned = [(row, text) for row, index in enumerate(found.kept.tolist()) for text in dataset.captions[index]]
    with autocast(model.config.precision, model.embed.device):
        texts = embed_texts(model.clip, [text for _, text in owned])
    images = F.normalize(model.projected(found.values), dim=1)
    ranks = ranks_of_captions(images, texts, torch.tensor([row for row, _ in owned]))
    counts = {"images": len(images), "texts": len(texts), "skipped": len(found.skipped)}
    return recalls(ranks, _KS) | counts


def meets_zero_shot(zero_shot: float, shots: dict[str, dict[str, float]]) -> float | None:
    """Returns how many images per class a probe needs to be as good as zero-shot.

    Between two numbers of shots the accuracy is taken to rise evenly with their logarithm, as in the paper
    (arXiv 2103.00020, figure 7).

    Returns:
        Shots, at least the smallest number; None: it needs more than the largest, or there is none.
    """
    points = sorted((int(count), entry["top1"]) for count, entry in shots.items())
    for place, (count, top1) in enumerate(points):
        if top1 < zero_shot:
            continue
        if not place:
            return float(count)
        before, lower = points[place - 1]
        part = (zero_shot - lower) / (top1 - lower)
        return 2 ** (math.log2(before) + part * (math.log2(count) - math.log2(before)))
    return None
