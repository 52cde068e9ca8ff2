"""The evaluation's page: curves, confusions, and the best, worst and missed detections as pictures."""

# C names, N detections, O objects of all images; T, R, K, A as in `regionclip.evaluators`
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_base.errors import InputError
from clip_base.files import write_text
from regionclip import gallery, page
from regionclip.confusion import NOT_JUDGED, RIGHT, VERDICTS, WRONG_NAME, Judged
from regionclip.evaluation import NOTHING, Evaluation, mean_of
from regionclip.figures import Points, line_chart, percent
from regionclip.lvis import RECALLS
from regionclip.visualize import Colour

PICTURES = 18  # of each kind
A_CATEGORY = 2  # at most, of each kind
CONFUSIONS, MATRIX = 15, 16
PER_CLASS = 120
STAR = "★ "
GOOD: Colour = (60, 200, 110)
BAD: Colour = (235, 70, 80)
MISSED: Colour = (240, 180, 40)
Places = NDArray[np.int64]
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def write_page(
    path: Path,
    evaluation: Evaluation,
    judged: Judged,
    paths: Mapping[int, Path],
    images: Path | None,
    metrics: Mapping[str, float],
) -> None:
    """Writes the page; it opens from disk and loads nothing else.

    Args:
        path: the HTML file.
        evaluation: what was measured.
        judged: its detections, matched with the truth.
        paths: image id -> file, relative to `images`.
        images: the folder of the pictures; None: the page has no pictures.
        metrics: the job's figures, of which top-1 and top-5 are shown too.
    """
    threshold = judged.best_threshold()
    novel = {row["name"] for row in evaluation.per_class if row["novel"]}
    starred = [STAR * (name in novel) + name for name in judged.names]
    matrix = judged.matrix(threshold)
    files = {} if images is None else {image: images / file for image, file in paths.items()}
    values = {
        "lead": _lead(evaluation, len(paths)),
        "tiles": page.tiles(_tiles(metrics)),
        "table": page.plain_table(("in percent", *COLUMNS), _summary(evaluation)),
        "novel_note": NOVEL_NOTE if novel else "",
        "curves": _curves(evaluation),
        "confusion_lead": _confusion_lead(judged, threshold),
        "confusions": _confusions(matrix, starred),
        "matrix": _matrix(matrix, starred),
        "pictures": _pictures(judged, threshold, starred, files),
        "per_class": _per_class(evaluation),
    }
    write_text(path, page.document("evaluation.html", "Evaluation of detections", values))


NOVEL_NOTE = '<b>Base</b> categories had boxes in training, <b class="novel-ink">★ novel</b> ones none.'


def _lead(evaluation: Evaluation, images: int) -> str:
    boxes = sum(row["boxes"] for row in evaluation.per_class)
    text = (
        f"{len(evaluation.counted):,} detections in {images:,} images, against {boxes:,} objects of "
        f"{len(evaluation.per_class):,} categories."
    )
    if evaluation.ignored:
        text += (
            f" {evaluation.ignored:,} more do not count: of other categories, or, by LVIS's protocol, "
            "beyond an image's best ones or of a category that nobody looked for there."
        )
    return text


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


def _tiles(metrics: Mapping[str, float]) -> dict[str, str]:
    return {title: percent(metrics[key]) for key, title in TILES.items() if metrics.get(key, NOTHING) >= 0}


def _summary(evaluation: Evaluation) -> list[list[str]]:
    """Returns the mean figures of novel, base and all categories, as far as there are such parts."""
    rows = []
    for part in ("novel", "base", "all"):
        columns = _columns(evaluation, part)
        if f"AP_{part}" in evaluation.metrics and columns:
            table = evaluation.precision[:, :, columns]
            cells = (table[..., 0], table[0, ..., 0], table[5, ..., 0], *(table[..., a] for a in (1, 2, 3)))
            rows.append([f"{part} ({len(columns)} categories)", *(percent(mean_of(cell)) for cell in cells)])
    return rows


def _columns(evaluation: Evaluation, part: str) -> list[int]:
    wanted = {"novel": (True,), "base": (False,), "all": (True, False, None)}[part]
    return [k for k, row in enumerate(evaluation.per_class) if row["novel"] in wanted]


def _curves(evaluation: Evaluation) -> str:
    means: dict[str, Points] = {}
    # The chart colours lines by place: base is blue and novel orange, as everywhere.
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
    charts = (("Mean over categories", means), ("Categories with the most objects", few))
    return "".join(line_chart(title, lines, "recall", shares=True) for title, lines in charts)


def _points(precision: NDArray[np.float64]) -> Points:
    return list(zip(RECALLS.tolist(), precision.tolist(), strict=True))


def _confusion_lead(judged: Judged, threshold: float) -> str:
    if not np.isfinite(threshold):
        return "No detection fits an object of its name, so that there is nothing to compare."
    kept = judged.verdicts[judged.scores >= threshold]
    shares = ", ".join(
        f"{percent(float((kept == verdict).mean()))} % {word}"
        for verdict, word in enumerate(VERDICTS)
        if (kept == verdict).any()
    )
    missed = len(judged.missed(threshold))
    return (
        f"Detections from a score of {threshold:.3g} on, where precision and recall balance best (F1): "
        f"{len(kept):,}; {shares}. {missed:,} of {len(judged.object_labels):,} objects are missed: "
        "no such detection fits them (IoU 0.5), whatever its name."
    )


def _confusions(matrix: Places, names: Sequence[str]) -> str:
    wrong = matrix[:-1, :-1] * ~np.eye(len(names), dtype=bool)
    order = (-wrong).flatten().argsort(kind="stable")[:CONFUSIONS]
    rows = []
    for true, named in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[true, named]:
            share = wrong[true, named] / matrix[true].sum()
            rows.append([names[true], names[named], f"{wrong[true, named]:,}", percent(float(share))])
    if not rows:
        return "<p>No object is called by a wrong name.</p>"
    return page.plain_table(("object", "called", "times", "% of such objects"), rows, words=2)


def _matrix(matrix: Places, names: Sequence[str]) -> str:
    """Returns the confusion matrix of the categories that are mistaken most, with what was missed."""
    inner = matrix[:-1, :-1]
    wrong = inner * ~np.eye(len(names), dtype=bool)
    mistaken = wrong.sum(0) + wrong.sum(1)
    order = np.lexsort((np.arange(len(names)), -inner.diagonal(), -mistaken))[:MATRIX]
    chosen = sorted(order.tolist())
    places = [*chosen, len(names)]
    rows = [*(names[k] for k in chosen), "nothing there"]
    columns = [*(names[k] for k in chosen), "missed"]
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in columns)
    body = ""
    for title, row in zip(rows, places, strict=True):
        most = max(int(matrix[row].sum()), 1)
        cells = "".join(_cell(int(matrix[row, column]), most, row, column, len(names)) for column in places)
        body += f'<tr><th scope="row">{escape(title)}</th>{cells}</tr>'
    note = (
        f"The {len(chosen)} categories that are confused most. Rows: what is there; columns: what it is "
        "called. An object that is called by two names stands in two columns. “Nothing there” also counts "
        "objects that were found a second time."
    )
    return (
        f'<p class="note">{note}</p><div class="wide"><table class="matrix">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(count: int, most: int, row: int, column: int, background: int) -> str:
    """Returns a cell, the darker the larger its share of the row."""
    style = ' class="right"' if row == column != background else ""
    colour = "var(--base)" if row == column else "var(--novel)"
    shade = f"color-mix(in srgb, {colour} {round(75 * count / most)}%, transparent)"
    return f'<td{style} style="background: {shade}">{count or ""}</td>'


def _pictures(judged: Judged, threshold: float, names: Sequence[str], files: Mapping[int, Path]) -> str:
    if not files:
        note = '<p class="note">Give images=DIR to see detections.</p>'
        return f"<section><h2>Pictures</h2>{note}</section>"
    sure = (-judged.scores).argsort(kind="stable")
    right = sure[judged.verdicts[sure] == RIGHT]
    wrong = sure[~np.isin(judged.verdicts[sure], (RIGHT, NOT_JUDGED))]
    missed = judged.missed(threshold)
    areas = np.diff(judged.object_boxes.reshape(-1, 2, 2), axis=1).prod(-1).flatten()
    missed = missed[(-areas[missed]).argsort(kind="stable")]

    def detection(place: int) -> str:
        name, verdict = names[judged.labels[place]], judged.verdicts[place]
        caption = f"<b>{escape(name)}</b> {judged.scores[place]:.2f}"
        if verdict != RIGHT:
            is_named = bool(verdict == WRONG_NAME)
            word = names[judged.object_labels[judged.shown[place]]] if is_named else VERDICTS[verdict]
            caption += f'<span class="tag wrong">{"it is: " * is_named}{escape(word)}</span>'
        path, box = files[int(judged.images[place])], judged.boxes[place].tolist()
        return gallery.box_figure(
            path, box, GOOD if verdict == RIGHT else BAD, caption, f"{name}, {path.name}"
        )

    def missing(place: int) -> str:
        name, path = names[judged.object_labels[place]], files[int(judged.object_images[place])]
        box = judged.object_boxes[place].tolist()
        return gallery.box_figure(path, box, MISSED, f"<b>{escape(name)}</b>", f"missed {name}, {path.name}")

    kinds: tuple[tuple[str, Places, Places, Callable[[int], str]], ...] = (
        ("The surest right ones", right, judged.labels, detection),
        ("The surest wrong ones", wrong, judged.labels, detection),
        ("The largest missed objects", missed, judged.object_labels, missing),
    )
    parts = []
    for title, places, labels, figure in kinds:
        shown = _figures(_spread(places, labels), figure)
        parts.append(f'<section><h2>{title}</h2><div class="pairs">{shown}</div></section>')
    return "".join(parts)


def _spread(places: Places, labels: Places) -> Iterable[int]:
    """Yields places in their order, few of each label."""
    used: Counter[int] = Counter()
    for place in places.tolist():
        label = int(labels[place])
        used[label] += 1
        if used[label] <= A_CATEGORY:
            yield place


def _figures(places: Iterable[int], figure: Callable[[int], str]) -> str:
    made: list[str] = []
    unreadable = 0
    for place in places:
        if len(made) == PICTURES or unreadable > PICTURES:
            break
        try:
            made.append(figure(place))
        except InputError:
            unreadable += 1
    if unreadable:
        made.append(f"<p>{unreadable} pictures could not be read.</p>")
    return "".join(made) or "None."


def _per_class(evaluation: Evaluation) -> str:
    rows = sorted(evaluation.per_class, key=lambda row: (not row["novel"], -row["AP50"], row["name"]))
    cells = [
        [
            STAR * bool(row["novel"]) + row["name"],
            f"{row['boxes']:,}",
            f"{row['detections']:,}",
            percent(row["AP"]),
            percent(row["AP50"]),
        ]
        for row in rows[:PER_CLASS]
    ]
    table = page.plain_table(("category", "objects", "detections", "AP", "AP50"), cells)
    more = len(rows) - len(cells)
    return table + (f'<p class="note">{more:,} more in per_class.csv.</p>' if more else "")
