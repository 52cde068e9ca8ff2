"""The evaluation report: curves, confusions, and correct, false and missed detections as images."""

# C names, N detections, O objects of all images; T, R, K, A as in `regionclip.metrics.coco_api`
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_base.images.roots import ImageRoot
from clip_base.storage.files import write_text
from regionclip.data.annotations import ImageAnnotations
from regionclip.metrics.average_precision import NOTHING, Evaluation, mean_of
from regionclip.metrics.lvis import RECALLS
from regionclip.metrics.matching import CORRECT, IGNORED, MISCLASSIFIED, OUTCOMES, MatchResult
from regionclip.reports import html
from regionclip.reports.charts import Chart, Points, line_chart
from regionclip.reports.crops import CropBudget, LabeledImage
from regionclip.reports.html import percent

MAX_IMAGES = 18  # of each kind
MAX_PER_CATEGORY = 2  # of each kind
MAX_CONFUSIONS, MATRIX_SIZE = 15, 16
STAR = "★ "
GREEN = (60, 200, 110)
RED = (235, 70, 80)
YELLOW = (240, 180, 40)
Places = NDArray[np.int64]
Files = Mapping[int, tuple[Path, tuple[int, int]]]  # image id: its file, and its annotated height and width
TILES = {
    "AP50_novel": "AP50 novel",
    "AP50_base": "AP50 base",
    "AP50_all": "AP50 all",
    "APr": "AP, rare",
    "APc": "AP, common",
    "APf": "AP, frequent",
    "top1": "top-1, true boxes",
    "top5": "top-5, true boxes",
}


def write_page(
    path: Path,
    evaluation: Evaluation,
    matches: MatchResult,
    truth: Sequence[ImageAnnotations],
    images: ImageRoot | None,
    metrics: Mapping[str, float],
) -> None:
    """Writes the page; it opens from disk and loads nothing else.

    Args:
        path: the HTML file.
        evaluation: what was measured.
        matches: its detections, matched with the ground truth.
        truth: the annotated images; their paths are relative to `images`.
        images: the folder or the tars of the images; None: the page has no images.
        metrics: the job's figures, of which top-1 and top-5 are shown too.
    """
    threshold = matches.best_threshold()
    rows = sorted(evaluation.per_class, key=lambda row: (not row["novel"], -row["AP50"], row["name"]))
    novel = {row["name"] for row in rows if row["novel"]}
    names = [STAR * (name in novel) + name for name in matches.names]
    matrix = matches.matrix(threshold)
    kept = matches.outcomes[matches.scores >= threshold]
    shares = {name: (kept == number).mean() for number, name in enumerate(OUTCOMES) if (kept == number).any()}
    budget = CropBudget()
    files = (
        {}
        if images is None
        else {one.image_id: (images.path(str(one.path)), (one.height, one.width)) for one in truth}
    )
    page = html.render(
        "evaluation.html",
        num_detections=len(evaluation.counted),
        num_images=len(truth),
        num_objects=sum(row["boxes"] for row in rows),
        num_categories=len(rows),
        num_ignored=evaluation.ignored,
        figures={
            title: percent(metrics[key]) for key, title in TILES.items() if metrics.get(key, NOTHING) >= 0
        },
        summary=_summary(evaluation),
        has_novel=bool(novel),
        curves=_curves(evaluation),
        threshold=threshold,
        num_kept=len(kept),
        outcomes=shares,
        num_missed=len(matches.missed(threshold)),
        confusions=_confusions(matrix, names),
        matrix=_matrix(matrix, names),
        kinds=_images(matches, threshold, names, files, budget) if files else [],
        budget=budget,
        per_class=[
            [
                STAR * bool(row["novel"]) + row["name"],
                *(row[key] for key in ("boxes", "detections", "AP", "AP50")),
            ]
            for row in rows
        ],
    )
    write_text(path, page)


def _summary(evaluation: Evaluation) -> list[list[str | float]]:
    """Returns the mean figures of novel, base and all categories, as far as there are such parts."""
    rows: list[list[str | float]] = []
    for part in ("novel", "base", "all"):
        columns = _columns(evaluation, part)
        if f"AP_{part}" in evaluation.metrics and columns:
            table = evaluation.precision[:, :, columns]
            cells = (table[..., 0], table[0, ..., 0], table[5, ..., 0], *(table[..., a] for a in (1, 2, 3)))
            rows.append([f"{part} ({len(columns)} categories)", *map(mean_of, cells)])
    return rows


def _columns(evaluation: Evaluation, part: str) -> list[int]:
    wanted = {"novel": (True,), "base": (False,), "all": (True, False, None)}[part]
    return [k for k, row in enumerate(evaluation.per_class) if row["novel"] in wanted]


def _curves(evaluation: Evaluation) -> list[Chart]:
    means: dict[str, Points] = {}
    # A chart colors lines by place: base is blue and novel orange, as everywhere.
    for part in ("base", "novel", "all"):
        columns = _columns(evaluation, part)
        table = evaluation.precision[0][:, columns, 0].T  # [k, R]
        measured = table[table[:, 0] > -1]
        if len(measured) and not (part == "all" and len(means) == 1):
            means[part] = _points(measured.mean(0))
    rows = [(row["boxes"], k) for k, row in enumerate(evaluation.per_class) if row["boxes"]]
    rows.sort(key=lambda row: -row[0])
    novel = [row for row in rows if evaluation.per_class[row[1]]["novel"]][:2]
    few: dict[str, Points] = {}
    for _, k in [*[row for row in rows if row not in novel][: 4 - len(novel)], *novel]:
        name = f"{STAR * bool(evaluation.per_class[k]['novel'])}{evaluation.per_class[k]['name']}"
        few[name] = _points(evaluation.precision[0, :, k, 0])
    titles = {"Mean over categories": means, "Categories with the most objects": few}
    return [line_chart(title, lines, "recall", shares=True) for title, lines in titles.items()]


def _points(precision: NDArray[np.float64]) -> Points:
    return list(zip(RECALLS.tolist(), precision.tolist(), strict=True))


def _confusions(matrix: Places, names: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """Returns what is misclassified most often: object, its wrong name, how often, share of such objects."""
    wrong = matrix[:-1, :-1] * ~np.eye(len(names), dtype=bool)
    order = (-wrong).flatten().argsort(kind="stable")[:MAX_CONFUSIONS]
    return [
        (names[true], names[named], int(wrong[true, named]), float(wrong[true, named] / matrix[true].sum()))
        for true, named in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[true, named]
    ]


def _matrix(matrix: Places, names: Sequence[str]) -> dict[str, Any]:
    """Returns the confusion matrix of the categories that are misclassified most, with what was missed.

    Returns:
        `columns`: their names; `rows`: a name and, for each column, a count and how dark its cell is in
        percent, by its share of the row.
    """
    inner = matrix[:-1, :-1]
    wrong = inner * ~np.eye(len(names), dtype=bool)
    order = np.lexsort((np.arange(len(names)), -inner.diagonal(), -wrong.sum(0) - wrong.sum(1)))
    chosen = sorted(order[:MATRIX_SIZE].tolist())
    places = [*chosen, len(names)]
    shown = matrix[np.ix_(places, places)]
    shades = (75 * shown / shown.sum(1, keepdims=True).clip(1)).round().astype(int)
    cells = [list(zip(*pair, strict=True)) for pair in zip(shown.tolist(), shades.tolist(), strict=True)]
    titles = [names[k] for k in chosen]
    return {"columns": [*titles, "missed"], "rows": list(zip([*titles, "background"], cells, strict=True))}


def _images(
    matches: MatchResult, threshold: float, names: Sequence[str], files: Files, budget: CropBudget
) -> list[tuple[str, list[LabeledImage]]]:
    """Returns kinds of detections and objects, each with a title and the images that show it best."""
    ranked = (-matches.scores).argsort(kind="stable")
    correct = ranked[matches.outcomes[ranked] == CORRECT]
    wrong = ranked[~np.isin(matches.outcomes[ranked], (CORRECT, IGNORED))]
    missed = matches.missed(threshold)
    areas = np.diff(matches.object_boxes.reshape(-1, 2, 2), axis=1).prod(-1).flatten()
    missed = missed[(-areas[missed]).argsort(kind="stable")]

    def detection(place: int) -> LabeledImage | None:
        name, outcome = names[matches.labels[place]], matches.outcomes[place]
        caption = [("name", name), ("score", f" {matches.scores[place]:.2f}")]
        if outcome == MISCLASSIFIED:
            caption.append(
                ("tag misclassified", f"it is: {names[matches.object_labels[matches.shown[place]]]}")
            )
        elif outcome != CORRECT:
            caption.append(("tag misclassified", OUTCOMES[outcome]))
        (path, size), color = files[int(matches.images[place])], GREEN if outcome == CORRECT else RED
        return budget.crop(path, size, matches.boxes[place].tolist(), color, f"{name}, {path.name}", caption)

    def missing(place: int) -> LabeledImage | None:
        name, box = names[matches.object_labels[place]], matches.object_boxes[place].tolist()
        path, size = files[int(matches.object_images[place])]
        return budget.crop(path, size, box, YELLOW, f"missed {name}, {path.name}", [("name", name)])

    return [
        (title, _shown(places, labels, label, budget))
        for title, places, labels, label in (
            ("Correct detections with the highest scores", correct, matches.labels, detection),
            ("False detections with the highest scores", wrong, matches.labels, detection),
            ("The largest missed objects", missed, matches.object_labels, missing),
        )
    ]


def _shown(
    places: Places, labels: Places, label: Callable[[int], LabeledImage | None], budget: CropBudget
) -> list[LabeledImage]:
    """Returns the first images, few of each label, and gives up where as many and more could not be read."""
    made: list[LabeledImage] = []
    used: Counter[int] = Counter()
    unreadable = budget.unreadable
    for place in places.tolist():
        used[labels[place]] += 1
        if len(made) == MAX_IMAGES or budget.unreadable - unreadable > MAX_IMAGES:
            break
        if used[labels[place]] <= MAX_PER_CATEGORY and (image := label(place)) is not None:
            made.append(image)
    return made
