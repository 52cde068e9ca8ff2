"""The table of a benchmark as CSV, Markdown and a page with the figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clip_base.benchmark import robustness, scaling
from clip_base.benchmark.cells import Figures, meets_zero_shot
from clip_base.benchmark.datasets import BenchmarkDataset
from clip_base.benchmark.published import METRICS
from clip_base.benchmark.robustness import Shift
from clip_base.evaluation.tables import to_csv
from clip_base.images.html import figure_png, page_environment, png_uri
from clip_base.storage.files import replacing, write_text

PAGE, FIGURE, SCALING, SHIFTS = "report.html", "benchmark.png", "scaling.png", "robustness.png"
_DASH = "–"


@dataclass(frozen=True)
class Cell:
    """What was measured of a model on a dataset by one task.

    Attributes:
        model: its name.
        dataset: its name.
        task: one of `cells.TASKS`.
        figures: shares in [0, 1], and counts.
        skipped: images that could not be used.
    """

    model: str
    dataset: str
    task: str
    figures: Figures
    skipped: list[dict[str, Any]]


@dataclass
class Report:
    """What was measured.

    Attributes:
        datasets: all of them.
        cells: models on datasets.
        compute: GFLOPs per image by model.
        shifts: models on datasets and their shifted versions.
    """

    datasets: Sequence[BenchmarkDataset]
    cells: list[Cell] = field(default_factory=list)
    compute: dict[str, float] = field(default_factory=dict)
    shifts: list[Shift] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A model on a dataset.

    Attributes:
        model: its name.
        dataset: its name.
        note: what the paper measures instead of the accuracy; "" for the accuracy.
        figures: the cells' figures by task.
        per_class: whether the mean of the classes' accuracies counts, as in the paper.
    """

    model: str
    dataset: str
    note: str
    figures: dict[str, Figures]
    per_class: bool

    def score(self, task: str) -> float | None:
        """Returns the accuracy of `zeroshot` or `linear_probe`; None: not measured."""
        found = self.figures.get(task)
        return None if found is None else float(found["mean_per_class" if self.per_class else "top1"])

    @property
    def shots(self) -> dict[str, dict[str, float]]:
        """Mean and deviation of the few-shot probes' accuracy, by the number of shots."""
        found: dict[str, dict[str, float]] = self.figures.get("few_shot", {}).get("shots", {})
        return found

    @property
    def to_zero_shot(self) -> str:
        """How many shots a probe needs to be as good as zero-shot."""
        zero_shot = self.figures.get("zeroshot")
        if zero_shot is None or not self.shots:
            return ""
        found = meets_zero_shot(zero_shot["top1"], self.shots)
        return f"> {max(map(int, self.shots))}" if found is None else f"{found:.1f}"

    @property
    def recalls(self) -> tuple[float | None, float | None]:
        """R@1 from images to texts and back."""
        found = self.figures.get("retrieval", {})
        return found.get("image_to_text_R@1"), found.get("text_to_image_R@1")


def rows_of(cells: Sequence[Cell], datasets: Sequence[BenchmarkDataset]) -> list[Row]:
    """Returns a row for each model and dataset, in the order of the cells."""
    metric = {one.name: one.published.metric if one.published else "accuracy" for one in datasets}
    figures: dict[tuple[str, str], dict[str, Figures]] = {}
    for cell in cells:
        figures.setdefault((cell.model, cell.dataset), {})[cell.task] = cell.figures
    return [
        Row(
            model,
            dataset,
            "" if metric[dataset] in ("accuracy", "mean_per_class") else METRICS[metric[dataset]],
            found,
            metric[dataset] == "mean_per_class",
        )
        for (model, dataset), found in figures.items()
    ]


def write_report(out: Path, report: Report) -> str:
    """Writes table.csv, table.md, the figures and the page; returns the Markdown table."""
    rows = rows_of(report.cells, report.datasets)
    write_text(out / "table.csv", to_csv(_csv_rows(rows, report.compute)))
    header, lines, notes = _table(rows)
    text = _markdown(header, lines, notes)
    pictures = [_picture(out / FIGURE, "Zero-shot, linear probe and few-shot curves", draw(rows))]
    errors: dict[str, dict[str, float]] = {}
    for row in rows:
        score = row.score("zeroshot")
        if score is not None:
            errors.setdefault(row.model, {})[row.dataset] = 1 - score
    scaled = scaling.draw(report.compute, errors)
    if scaled is not None:
        pictures.append(_picture(out / SCALING, "Error over compute", scaled[0]))
        law = scaled[1]
        notes.append(
            f"Error over compute: error is proportional to compute^{law.exponent:.3f} (standard error "
            f"{law.exponent_error:.3f}); models are {10**law.deviation - 1:.0%} off the line."
        )
        text = _markdown(header, lines, notes)
    shifted: tuple[list[str], list[list[str]]] = ([], [])
    if report.shifts:
        shifted = robustness.table(report.shifts)
        text += "\n" + _markdown(*shifted, ["Effective robustness: zero-shot above the fit of the probes."])
        pictures.append(_picture(out / SHIFTS, "Accuracy under shift", robustness.draw(report.shifts)))
    write_text(out / "table.md", text)
    template = page_environment("clip_base.benchmark").get_template("benchmark.html")
    tables = [(header, lines), shifted] if report.shifts else [(header, lines)]
    write_text(out / PAGE, template.render(tables=tables, notes=notes, pictures=pictures) + "\n")
    return text


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    rows = [header, ["---", "---", *(["---:"] * (len(header) - 2))], *lines]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *notes]) + "\n"


def _picture(path: Path, what: str, drawn: bytes) -> tuple[str, str]:
    """Writes a PNG; returns what it shows, and it as an address for the page."""
    with replacing(path) as temporary:
        temporary.write_bytes(drawn)
    return what, png_uri(drawn)


def _csv_rows(rows: Sequence[Row], compute: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns all figures, with the same columns in each row."""
    flat = []
    for row in rows:
        values: dict[str, Any] = {"model": row.model, "dataset": row.dataset}
        values["gflops_per_image"] = compute.get(row.model, "")
        for task, figures in row.figures.items():
            if task == "few_shot":
                for count, entry in figures["shots"].items():
                    values[f"few_shot_{count}"] = entry["top1"]
                    values[f"few_shot_{count}_deviation"] = entry["deviation"]
            else:
                values |= {f"{task}_{name}": value for name, value in figures.items()}
        flat.append(values | {"shots_to_zeroshot": row.to_zero_shot})
    columns = list(dict.fromkeys(name for values in flat for name in values))
    return [{name: values.get(name, "") for name in columns} for values in flat]


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns the header, the cells and the notes of the table; columns that no row has are left out."""
    counts = sorted({count for row in rows for count in row.shots}, key=int)
    header = ["model", "dataset", "zero-shot", "linear probe"]
    header += [f"{count} shot{'s' * (count != '1')}" for count in counts]
    header += ["shots for zero-shot", "image to text R@1", "text to image R@1"]
    lines = []
    for row in rows:
        few = [_percent(row.shots.get(count, {}).get("top1")) for count in counts]
        mark = "*" if row.per_class else "†" if row.note else ""
        scores = [_percent(row.score(task)) for task in ("zeroshot", "linear_probe")]
        line = [_cell(row.model), _cell(row.dataset) + mark, *scores, *few, row.to_zero_shot or _DASH]
        lines.append(line + [_percent(value) for value in row.recalls])
    used = [at for at in range(len(header)) if at < 2 or any(line[at] != _DASH for line in lines)]
    notes = ["Accuracies and recalls in %."]
    if any(row.per_class for row in rows):
        notes.append("* zero-shot and linear probe: mean of the classes' accuracies, as in CLIP's paper.")
    for row in {row.dataset: row for row in rows if row.note}.values():
        notes.append(f"† {_cell(row.dataset)}: accuracy; CLIP's paper reports {row.note}.")
    return [header[at] for at in used], [[line[at] for at in used] for line in lines], notes


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _percent(share: float | None) -> str:
    return _DASH if share is None else f"{100 * share:.1f}"


def draw(rows: Sequence[Row]) -> bytes:
    """Returns a PNG: zero-shot and probe of each dataset, and the few-shot curves where there are some."""
    few = [row for row in rows if row.shots]
    figure = Figure(figsize=(11 if few else 7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if few else 1, squeeze=False)[0]
    _bars(panels[0], rows)
    if few:
        _curves(panels[1], few)
    return figure_png(figure)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws a dot per model and dataset, of zero-shot (or of recall) and of the probe."""
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    for number, model in enumerate(models):
        own = {row.dataset: row for row in rows if row.model == model}
        color, offset = f"C{number % 10}", 0.6 * ((number + 0.5) / len(models) - 0.5)
        marks: dict[str, tuple[str, dict[str, float | None]]] = {
            "zero-shot": ("*", {name: row.score("zeroshot") for name, row in own.items()}),
            "linear probe": ("o", {name: row.score("linear_probe") for name, row in own.items()}),
            "image to text R@1": ("D", {name: row.recalls[0] for name, row in own.items()}),
        }
        for what, (mark, values) in marks.items():
            shown = {name: value for name, value in values.items() if value is not None}
            if shown:
                places = [datasets.index(name) + offset for name in shown]
                label = f"{model}, {what}"
                values_shown = [100 * value for value in shown.values()]
                axes.plot(values_shown, places, mark, color=color, label=label, alpha=0.85)
    axes.set_yticks(range(len(datasets)), datasets)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy or recall, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws the mean over the datasets of each model's few-shot probes; zero-shot is a star at 0 shots."""
    for number, model in enumerate(dict.fromkeys(row.model for row in rows)):
        own = [row for row in rows if row.model == model]
        counts = sorted({count for row in own for count in row.shots}, key=int)
        means = [
            100 * statistics.fmean(row.shots[count]["top1"] for row in own if count in row.shots)
            for count in counts
        ]
        color = f"C{number % 10}"
        axes.plot([int(count) for count in counts], means, "o-", color=color, label=f"{model}, probe")
        zero = [100 * row.figures["zeroshot"]["top1"] for row in own if "zeroshot" in row.figures]
        if zero:
            mean = statistics.fmean(zero)
            axes.plot([0], [mean], "*", color=color, markersize=12, label=f"{model}, zero-shot")
            axes.axhline(mean, color=color, linewidth=0.8, linestyle=":")
    axes.set_xlabel("training images per class")
    axes.set_ylabel("top 1, %, mean of the datasets")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
