"""The job `benchmark`: several models on several datasets, in one table.

clip-base benchmark models=[RN50,ViT-B/32] datasets=[data/food101,coco:captions.json@val2017] out=table
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_base.benchmark.cells import TASKS, Figures, Model, ProbeOptions, measure, possible, shifted_probe
from clip_base.benchmark.datasets import BenchmarkDataset, open_dataset
from clip_base.benchmark.published import plain
from clip_base.benchmark.report import PAGE, Cell, Report, write_report
from clip_base.benchmark.robustness import Shift
from clip_base.benchmark.scaling import gflops_per_image
from clip_base.data.inputs import told_apart
from clip_base.evaluation.features import FeatureConfig, identity
from clip_base.jobs.compute import ComputeOptions
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.plugins import did_you_mean
from clip_base.jobs.run import RunFolder
from clip_base.jobs.skipped import max_skipped_option, require_share, require_usable, write_skipped
from clip_base.models.configs import ACTIVATIONS
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, write_json
from clip_base.storage.hashing import content_hash, text_hash
from clip_base.weights.load import find

CELLS, PACKED = "cells", "packed"


@everyday(
    "benchmark models=[RN50,ViT-B/32] datasets=[food101:data/food101,data/birds] out=runs/benchmark",
    input="datasets",
    output="out",
    model="models templates",
    quality="tasks shots",
    speed="batch_size workers device",
)
@dataclass(kw_only=True)
class BenchmarkConfig(ComputeOptions):
    """Options of `benchmark`."""

    models: list[str] = option(
        REQUIRED, "weights in any known format, or published models' names", runtime_only=True
    )
    datasets: list[str] = option(
        REQUIRED,
        "image folders, CLIP_benchmark's webdatasets, Parquet of images, captions FILE.json@IMAGES, "
        "torchvision:CIFAR10@DIR; NAME: before one is what the table calls it",
        runtime_only=True,
    )
    out: str = option(
        REQUIRED, "folder for the table; the same one takes more models and datasets", runtime_only=True
    )
    tasks: list[str] = option(list(TASKS), f"which of {', '.join(TASKS)}", runtime_only=True)
    shifts: list[str] = option(
        [],
        "DATASET:SHIFTED, names of two of the datasets with the same classes: robustness of zero-shot and of "
        "probes that are trained on the first one",
        runtime_only=True,
    )
    templates: str = option(
        "published", "prompts of datasets that have none and are not the paper's: published, simple or a file"
    )
    shots: list[int] = option([1, 2, 4, 8, 16], "training images per class of few-shot probes")
    seeds: int = option(3, "random samples of training images for each number of shots")
    seed: int = option(0, "determines the samples, and the images on which probes are tuned")
    validation: float = option(0.2, "share of each class's training images on which probes are tuned")
    activation: str = option("", "activation of weights that do not state it", choices=("", *ACTIVATIONS))
    batch_size: int = option(64, "images embedded at once", runtime_only=True)
    workers: int = option(2, "threads that decode images", runtime_only=True)
    max_skipped: float = max_skipped_option(0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models or not self.datasets:
            raise InputError("models and datasets must each name at least one")
        strange = next((task for task in self.tasks if task not in TASKS), None)
        if strange is not None or not self.tasks:
            raise InputError(f"tasks={self.tasks}: give some of {', '.join(TASKS)}")
        if not self.shots or min(self.shots) < 1 or self.seeds < 1:
            raise InputError(f"shots and seeds must be at least 1, found {self.shots} and {self.seeds}")
        if not 0 < self.validation < 1:
            raise InputError(f"validation must be in (0, 1), found {self.validation}")
        if self.workers < 1:
            raise InputError(f"workers must be at least 1, found {self.workers}")
        require_share(self.max_skipped)


def benchmark(config: BenchmarkConfig) -> None:
    """Measures several models on several datasets; writes table.csv, table.md and report.html.

    What was measured before, of the same weights and the same images, is not measured again.
    """
    folder = RunFolder(config.out, config, "benchmark")
    datasets = [open_dataset(entry, folder.path / PACKED, config.templates) for entry in config.datasets]
    names = [dataset.name for dataset in datasets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two datasets are called {twice!r}; name them, as in first:DIR,second:DIR")
    pairs = [pair_of(entry, datasets) for entry in config.shifts]
    report = Report(datasets)
    for name, weights in zip(model_names(config.models), config.models, strict=True):
        cells = _Cells(config, Model(name, _features(config, weights, folder.path)), folder.path)
        report.cells += [cell for dataset in datasets for cell in cells.of(dataset)]
        report.compute[name] = cells.compute()
        report.shifts += [cells.shift(*pair) for pair in pairs]
    skipped = {json.dumps(entry): entry for cell in report.cells for entry in cell.skipped}
    write_skipped(folder.path / "skipped.jsonl", skipped.values())
    print(write_report(folder.path, report), end="")
    folder.finish({f"{cell.model}, {cell.dataset}, {cell.task}": cell.figures for cell in report.cells})
    print(f"open {folder.path / PAGE} in a browser")


def pair_of(entry: str, datasets: Sequence[BenchmarkDataset]) -> tuple[BenchmarkDataset, BenchmarkDataset]:
    """Returns a dataset and its shifted version.

    Raises:
        InputError: one of them is none of the datasets, the first one has no images to train on, or their
            classes differ.
    """
    by_name = {dataset.name: dataset for dataset in datasets}
    first, _, second = entry.partition(":")
    lacking = next((name for name in (first, second) if name not in by_name), None)
    if lacking is not None:
        hint = did_you_mean(lacking, list(by_name))
        raise InputError(f"shifts={entry}: {lacking!r} is none of the datasets; {hint}")
    dataset, shifted = by_name[first], by_name[second]
    if not dataset.train or dataset.classes != shifted.classes:
        why = "have other classes" if dataset.train else f"cannot be probed: {first} has no training images"
        raise InputError(f"shifts={entry}: {first} and {second} {why}")
    return dataset, shifted


def model_names(models: Sequence[str]) -> list[str]:
    """Returns what the table calls models: published names as they are, files by as few folders as it takes.

    Raises:
        InputError: one is given twice.
    """
    paths = [str(Path(entry).with_suffix("")) if Path(entry).exists() else entry for entry in models]
    files = [path for path, entry in zip(paths, models, strict=True) if Path(entry).exists()]
    short = told_apart(files, "/".join) if files else []
    if short is None or len(set(models)) < len(models):
        raise InputError("models names one twice; give each once")
    by_path = dict(zip(files, short, strict=True))
    return [by_path.get(path, path) for path in paths]


def _features(config: BenchmarkConfig, weights: str, out: Path) -> FeatureConfig:
    return FeatureConfig(
        weights=str(find(weights)),
        out=str(out),
        activation=config.activation,
        features=str(out / "features"),
        batch_size=config.batch_size,
        workers=config.workers,
        max_skipped=config.max_skipped,
        precision=config.precision,
        device=config.device,
    )


class _Cells:
    """What is measured of a model, each once per content of the weights and of the images.

    Args:
        config: the job's options.
        model: the model.
        out: the run's folder, which keeps it.
    """

    def __init__(self, config: BenchmarkConfig, model: Model, out: Path) -> None:
        self.config, self.model, self.out = config, model, out
        self.weights = content_hash(model.embed.path)
        self.probes = ProbeOptions(tuple(config.shots), config.seeds, config.seed, config.validation)

    def of(self, dataset: BenchmarkDataset) -> Iterator[Cell]:
        """Yields all tasks of a dataset that it has what it takes for."""
        for task in possible(dataset):
            if task in self.config.tasks:
                yield self._measured(task, dataset)

    def shift(self, dataset: BenchmarkDataset, shifted: BenchmarkDataset) -> Shift:
        """Returns the accuracies on a dataset and on its shifted version."""
        own, other = (
            {task: self._measured(task, one).figures for task in tasks}
            for one, tasks in ((dataset, ("zeroshot", "linear_probe")), (shifted, ("zeroshot",)))
        )
        probe = self._cell(
            "shifted_probe",
            [dataset, shifted],
            lambda: shifted_probe(self.model, dataset, shifted, self.probes),
        )
        return Shift(
            self.model.name,
            (dataset.name, shifted.name),
            (own["linear_probe"]["top1"], probe.figures["top1"]),
            (own["zeroshot"]["top1"], other["zeroshot"]["top1"]),
            min(own["zeroshot"]["images"], other["zeroshot"]["images"]),
        )

    def compute(self) -> float:
        """Returns GFLOPs per image of the vision tower."""
        found = self._cell("compute", [], lambda: {"gflops": gflops_per_image(self.model.clip)})
        return float(found.figures["gflops"])

    def _measured(self, task: str, dataset: BenchmarkDataset) -> Cell:
        return self._cell(task, [dataset], lambda: measure(task, self.model, dataset, self.probes))

    def _cell(self, task: str, datasets: list[BenchmarkDataset], measured: Callable[[], Figures]) -> Cell:
        """Returns a cell as it is kept, or measured now."""
        decides = (self.weights, self.config.activation, self.config.precision, task, self.probes)
        key = text_hash([*decides, *(line for dataset in datasets for line in _identity(dataset))])[:16]
        named = "-".join(plain(name) for name in (self.model.name, *(one.name for one in datasets)))
        kept = self.out / CELLS / f"{named}-{task}-{key}.json"
        if not kept.exists():
            self.model.skipped.clear()
            figures = measured()
            reasons = [entry["reason"] for entry in self.model.skipped]
            total = sum(len(dataset.test) + len(dataset.train) for dataset in datasets)
            require_usable(reasons, total, self.config.max_skipped)
            write_json(kept, {"figures": figures, "skipped": self.model.skipped})
        held = read_json(kept, "cell of the table")
        return Cell(
            self.model.name, datasets[0].name if datasets else "", task, held["figures"], held["skipped"]
        )


def _identity(dataset: BenchmarkDataset) -> Iterator[str]:
    """Yields what decides the figures on a dataset: its images as they are now, names, prompts, captions."""
    for part in (dataset.test, dataset.train):
        for example in part:
            yield f"{identity(example.path)} {example.label}"
        yield ""
    yield from map(str, (dataset.classes, dataset.templates, dataset.captions))
