"""The job `linear-probe`: logistic regression on frozen features (arXiv 2103.00020, appendix A.3)."""

# N images, C classes, D size of the feature
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clip_base.data.coco import annotation_inputs
from clip_base.evaluation.datasets import EvaluationImage, coco_images, folder_images
from clip_base.evaluation.features import LAYERS, Embedder, FeatureConfig, note_skipped
from clip_base.evaluation.ranking import ranks_of_best
from clip_base.evaluation.tables import print_classes, summarize, to_csv
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder
from clip_base.jobs.skipped import require_present
from clip_base.runtime.errors import InputError, JobError
from clip_base.runtime.progress import Progress
from clip_base.storage.files import write_text
from clip_base.weights.load import weight_files

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

MAX_ITERATIONS = 1000
# The exponents of ten at which the search for C begins, and the width at which it ends: 8 steps a decade.
_START = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
_END = 1 / 8


@everyday(
    "linear-probe train=birds/train test=birds/test weights=RN50 out=runs/probe",
    input="train test train_annotations test_annotations",
    output="out",
    model="weights layer",
    quality="shots",
    speed="batch_size workers device",
)
@dataclass
class LinearProbeConfig(FeatureConfig):
    """Options of the linear and the few-shot probe."""

    train: str = option(
        REQUIRED, "folder with a subfolder of images for each class; with annotations: of images"
    )
    test: str = option(REQUIRED, "like train, with the same classes; evaluated once, at the end")
    train_annotations: str = option("", "COCO instances file: boxes are cropped, categories are the classes")
    test_annotations: str = option("", "as train_annotations")
    validation: float = option(0.2, "share of each class's training images on which C is chosen")
    layer: str = option(
        "penultimate", "features before (ViT) or after the projection; the same for ResNets", choices=LAYERS
    )
    shots: list[int] = option(
        [], "few-shot probes: training images per class, such as [1,2,4,8,16]; empty: none"
    )
    seeds: int = option(3, "random samples of training images for each few-shot probe")
    seed: int = option(0, "determines the validation split and the samples")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation < 1:
            raise InputError(f"validation must be in (0, 1), found {self.validation}")
        if any(shots < 1 for shots in self.shots) or self.seeds < 1:
            raise InputError(f"shots and seeds must be at least 1, found {self.shots} and {self.seeds}")


@dataclass(frozen=True)
class LabeledFeatures:
    """Features and their classes.

    Attributes:
        features: [N, D] float32.
        labels: [N] int64.
    """

    features: Floats
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: Labels) -> LabeledFeatures:
        """Returns some of the rows."""
        return LabeledFeatures(self.features[rows], self.labels[rows])


@dataclass(frozen=True)
class FewShotConfig:
    """Which few-shot probes are fitted.

    Attributes:
        shots: training images per class.
        seeds: draws for each number of them.
        seed: determines the draws.
    """

    shots: Sequence[int]
    seeds: int
    seed: int


@dataclass
class Fits:
    """Counts fits, and those that stopped at the limit of iterations."""

    made: int = 0
    unfinished: int = 0
    progress: Progress | None = field(default=None, repr=False)


def linear_probe(config: LinearProbeConfig) -> None:
    """Fits a linear classifier to frozen features; writes metrics.json, per_class.csv, few_shot.csv."""
    inputs = annotation_inputs(config, "train_annotations", "test_annotations")
    inputs |= weight_files(config, "weights")
    run = RunFolder(config.out, config, "linear-probe", inputs)
    done = run.finished()
    if done is not None:
        print(f"{run.path} is complete: top1 {done['top1']:.4f} with C {done['C']:.3g}")
        return
    (names, examples), (test_names, test_examples) = _listed(config, "train"), _listed(config, "test")
    if test_names != names:
        first, second = (f"{len(some)} ({', '.join(some[:3])}, …)" for some in (names, test_names))
        raise InputError(f"train and test must have the same classes; found {first} and {second}")
    embed = Embedder(config, run.path, config.layer)
    train, skipped = _embedded(config, embed, "train", examples)
    test, skipped_test = _embedded(config, embed, "test", test_examples)
    skipped += skipped_test
    total = len(train) + len(test) + len(skipped)
    note_skipped(skipped, total, config.max_skipped, run.path / "skipped.jsonl")
    fits = Fits()
    with Progress("probes") as fits.progress:
        held, rest = split(train.labels, config.validation, config.seed)
        c = search(train.pick(rest), train.pick(held), fits)
        # What chose C joins the training set for the last fit, as in the paper.
        ranks = ranks_of(fit(train, c, fits), test)
        few = few_shot(config, train.pick(rest), train.pick(held), test, fits)
    figures, classes = summarize(ranks, torch.from_numpy(test.labels), names)
    write_text(run.path / "per_class.csv", to_csv(classes))
    if few:
        write_text(run.path / "few_shot.csv", to_csv(few))
    figures |= {"C": c, "train_images": len(train), "skipped": len(skipped), "fits": fits.made}
    figures |= {"unfinished_fits": fits.unfinished, "few_shot": by_shots(few)}
    run.finish(figures)
    print_classes("linear probe", figures, classes, len(skipped))
    _print(figures)


def _listed(config: LinearProbeConfig, which: str) -> tuple[list[str], list[EvaluationImage]]:
    """Returns the names of the classes and the images of a part, which may not be there."""
    folder, annotations = getattr(config, which), getattr(config, f"{which}_annotations")
    if not annotations:
        return folder_images(folder)
    names, examples = coco_images(annotations, folder)
    require_present([example.path for example in examples], config.max_skipped, which)
    return names, examples


def _embedded(
    config: LinearProbeConfig, embed: Embedder, which: str, examples: list[EvaluationImage]
) -> tuple[LabeledFeatures, list[dict[str, Any]]]:
    found = embed(examples, f"{which} images")
    if not len(found.kept):
        folder = getattr(config, which)
        raise JobError(f"{which}={folder}: no image can be used (first: {found.skipped[0]['reason']})")
    labels = np.array([examples[index].label for index in found.kept.tolist()], np.int64)
    return LabeledFeatures(found.values.numpy(), labels), found.skipped


def split(labels: Labels, share: float, seed: int) -> tuple[Labels, Labels]:
    """Returns the rows to validate on, `share` of every class (at least one of two), and the others."""
    chance = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels):
        own = chance.permutation(np.flatnonzero(labels == label))
        held.append(own[: min(max(round(share * len(own)), 1), len(own) - 1)])
    rows = np.sort(np.concatenate(held))
    if not len(rows):
        raise InputError("no class has two training images; the probe needs some to choose C")
    return rows, np.setdiff1d(np.arange(len(labels)), rows)


def fit(train: LabeledFeatures, c: float, fits: Fits) -> LogisticRegression:
    """Fits multinomial logistic regression by L-BFGS, at most 1000 iterations, with sklearn's C."""
    if len(np.unique(train.labels)) < 2:
        raise InputError("all training images are of one class; the probe needs two")
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train.features, train.labels)
    fits.made += 1
    fits.unfinished += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    if fits.progress is not None:
        fits.progress.advance(note=f"C {c:.3g}")
    return model


def ranks_of(model: LogisticRegression, data: LabeledFeatures) -> Tensor:
    """Returns [N] int64, how many other classes score at least as much as the true one.

    A class that was never seen in training comes last.
    """
    scores = model.decision_function(data.features)
    if scores.ndim == 1:  # of two classes, that of the second
        scores = np.stack([-scores, scores], 1)
    right = np.asarray(model.classes_) == data.labels[:, None]  # [N, C of training]
    return ranks_of_best(torch.from_numpy(scores), torch.from_numpy(right))


def accuracy(model: LogisticRegression, data: LabeledFeatures) -> float:
    """Returns the share of rows that are classified rightly."""
    return float((ranks_of(model, data) < 1).double().mean())


def search(train: LabeledFeatures, validation: LabeledFeatures, fits: Fits) -> float:
    """Returns the C with the best accuracy on `validation`, of 96 logarithmic steps from 1e-6 to 1e6.

    Seven values are tried first, then the middles beside the best one, until neighbors are an eighth of a
    decade apart (arXiv 2103.00020, A.3). Of equals, the smaller C, which is the stronger regularization.
    """
    return 10 ** peak(lambda exponent: accuracy(fit(train, 10**exponent, fits), validation))


def peak(measure: Callable[[float], float]) -> float:
    """Returns the exponent at which `measure` is largest, by the paper's halving search."""
    found = {exponent: measure(exponent) for exponent in _START}
    step = _START[1] - _START[0]
    while True:
        best = max(sorted(found), key=lambda exponent: found[exponent])
        if step <= _END:
            return best
        step /= 2
        for exponent in (best - step, best + step):
            if _START[0] <= exponent <= _START[-1] and exponent not in found:
                found[exponent] = measure(exponent)


def few_shot(
    config: LinearProbeConfig | FewShotConfig,
    train: LabeledFeatures,
    validation: LabeledFeatures,
    test: LabeledFeatures,
    fits: Fits,
) -> list[dict[str, Any]]:
    """Returns a row for each number of shots and each draw: `shots`, `draw`, `images`, `C`, `top1`.

    C is chosen on at most min(shots, 4) validation images per class, as CoOp does (arXiv 2109.01134, 4.1).
    """
    rows = []
    for shots in config.shots:
        for number in range(config.seeds):
            chance = np.random.default_rng([config.seed, shots, number])
            drawn = train.pick(draw(train.labels, shots, chance))
            held_out = validation.pick(draw(validation.labels, min(shots, 4), chance))
            c = search(drawn, held_out, fits)
            top1 = accuracy(fit(drawn, c, fits), test)
            rows.append({"shots": shots, "draw": number, "images": len(drawn), "C": c, "top1": top1})
    return rows


def draw(labels: Labels, count: int, chance: np.random.Generator) -> Labels:
    """Returns `count` rows of each class, all of a class that has fewer."""
    return np.concatenate(
        [chance.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    )


def by_shots(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns mean and standard deviation of top1 over the draws, by the number of shots."""
    found = {}
    for shots in sorted({row["shots"] for row in rows}):
        values = [row["top1"] for row in rows if row["shots"] == shots]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
        found[str(shots)] = {"top1": mean, "deviation": spread, "draws": len(values)}
    return found


def _print(figures: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    console.print(
        f"C {figures['C']:.3g}, {figures['fits']} fits, {figures['unfinished_fits']} did not converge"
    )
    if figures["few_shot"]:
        table = Table(title="few-shot probes", title_justify="left")
        for column in ("images per class", "top 1", "deviation", "draws"):
            table.add_column(column, justify="right")
        for shots, entry in figures["few_shot"].items():
            table.add_row(shots, f"{entry['top1']:.1%}", f"{entry['deviation']:.1%}", str(entry["draws"]))
        console.print(table)
