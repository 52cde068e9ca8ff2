"""The job `classify`: images sorted into classes that are known by their names alone.

clip-base classify photos classes="cat, dog, neither" weights=RN50 out=runs/classified
"""

# N images, C classes
from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_base.evaluation.datasets import EvaluationImage
from clip_base.evaluation.features import Embedder, FeatureConfig, Features, note_skipped
from clip_base.evaluation.likelihood import LikelihoodEmbedder
from clip_base.evaluation.prompts import classifier, read_templates
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast
from clip_base.search.gallery import Thumbnail, write_gallery
from clip_base.search.images import FoundImage, images_of
from clip_base.storage.files import is_file, write_text
from clip_base.storage.tables import CLASS_FILES, TableWriter, read_class_list
from clip_base.weights.load import find, weight_files
from clip_base.weights.predictors import is_predictor

TABLE, PAGE = "predictions.csv", "report.html"
SHOWN = 24  # thumbnails of a class


@everyday(
    'classify photos classes="cat, dog" weights=RN50 out=sorted',
    input="images classes",
    output="out top_k report",
    model="weights templates",
    speed="batch_size workers device",
)
@dataclass
class ClassifyConfig(FeatureConfig):
    """Options of `classify`."""

    images: list[str] = option(
        REQUIRED, "folders with all below them, files, quoted patterns, or uncompressed tars", positional=True
    )
    classes: str = option(REQUIRED, 'the classes: "cat, dog", or a file with one per line (JSON, YAML, CSV)')
    templates: str = option(
        "published", "published (CLIP's 80 prompts), simple (one), or a file with one per line"
    )
    top_k: int = option(5, "most probable classes of each image in the table")
    report: bool = option(True, "write report.html: thumbnails of each class, the most certain ones first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, found {self.top_k}")


def classify(config: ClassifyConfig) -> None:
    """Classifies images by class names; leaves predictions.csv, report.html and skipped.jsonl.

    Probabilities are a softmax over the classes given: they say which fits best, not whether any does.
    """
    names = class_names(config.classes)
    found = images_of(config.images)
    inputs = weight_files(config, "weights") | files_of(config, "classes", "templates")
    inputs["images"] = "\n".join(f"{image.key} {image.stamp}" for image in found)
    run = RunFolder(config.out, config, "classify", inputs)
    if run.finished() is not None:
        print(f"{run.path} is complete: {run.path / TABLE}")
        return
    features, scores = _scores(config, run, names, [EvaluationImage(image.place, 0) for image in found])
    values, labels = scores.softmax(1).sort(1, True)  # [N, C]
    kept = [found[place] for place in features.kept.tolist()]
    write_text(run.path / TABLE, _table(kept, names, values, labels, config.top_k))
    best = labels[:, 0].bincount(minlength=len(names)).tolist()
    if config.report:
        _write_page(run.path / PAGE, kept, names, values, labels)
    run.finish({"images": len(kept), "skipped": len(features.skipped)})
    order = sorted(range(len(names)), key=lambda label: -best[label])
    print("\n".join(f"{best[label]:>8,}  {names[label]}" for label in order if best[label]))
    print(f"{run.path / TABLE}: {len(kept):,} images in {len(names):,} classes")
    if config.report:
        print(f"open {run.path / PAGE} in a browser")


def _scores(
    config: ClassifyConfig, run: RunFolder, names: list[str], images: list[EvaluationImage]
) -> tuple[Features, torch.Tensor]:
    """Returns the usable images' features, and [N, C]: what a softmax turns into probabilities of classes."""
    templates, skipped = read_templates(config.templates), run.path / "skipped.jsonl"
    if is_predictor(find(config.weights)):
        features = LikelihoodEmbedder(config, run.path, names, templates)(images, "classifying")
        note_skipped(features.skipped, len(images), config.max_skipped, skipped)
        return features, features.values
    embed = Embedder(config, run.path)
    # Names first: that one is too long for its prompt shows before all images are embedded.
    with autocast(config.precision, embed.device):
        directions = classifier(embed.model, names, templates, config.batch_size)
    embed.require_finite(directions, "class names")
    features = embed(images, "classifying")
    note_skipped(features.skipped, len(images), config.max_skipped, skipped)
    scale = embed.model.logit_scale.detach().exp().float().cpu()
    units = torch.nn.functional.normalize(features.values, dim=1)  # [N, D]
    return features, scale * units @ directions.float().cpu().T


def class_names(text: str) -> list[str]:
    """Returns the names that a user types: separated by commas, or in a file.

    Raises:
        InputError: fewer than two names, or one that stands twice.
    """
    is_list = is_file(text) or (Path(text).suffix.lower() in CLASS_FILES and "," not in text)
    names = [entry[0] for entry in read_class_list(text)] if is_list else text.split(",")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise InputError(f'classes needs two names or more, such as "cat, dog, neither", found {text!r}')
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"classes names {repeated!r} twice")
    return names


def _table(
    images: list[FoundImage], names: list[str], values: torch.Tensor, labels: torch.Tensor, top: int
) -> str:
    """Returns predictions.csv: a row per image."""
    top = min(top, len(names))
    text = io.StringIO()
    table = TableWriter(text)
    columns = [f"{what}_{place}" for place in range(1, top + 1) for what in ("name", "probability")]
    table.writerow(["file_name", *columns])
    for image, row, order in zip(images, values.tolist(), labels.tolist(), strict=True):
        pairs = ((names[label], f"{value:.5f}") for label, value in zip(order[:top], row[:top], strict=True))
        table.writerow([image.key, *(part for pair in pairs for part in pair)])
    return text.getvalue()


def _write_page(
    path: Path, images: list[FoundImage], names: list[str], values: torch.Tensor, labels: torch.Tensor
) -> None:
    sections = []
    for label, name in enumerate(names):
        rows = (labels[:, 0] == label).nonzero().flatten().tolist()
        rows.sort(key=lambda row: -float(values[row, 0]))
        if rows:
            shown = [
                Thumbnail(images[row].key, f"{float(values[row, 0]):.2f}", images[row].place)
                for row in rows[:SHOWN]
            ]
            sections.append((f"{name}: {len(rows):,}", shown))
    lead = f"{len(images):,} images by their most probable class, most certain first; up to {SHOWN} each"
    write_gallery(path, "Classified images", lead, sections)
