"""Draws the figure of docs/results.md: AP50 of base against novel categories, a point per method.

python benchmarks/results_figure.py --world fair --write docs/images/results.svg
"""

from __future__ import annotations

import argparse
import io
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from results_rows import AP50, ROWS
from results_steps import WORLDS
from results_tables import finished_rows

from clip_base.storage.files import write_text

FINISHED = Path(__file__).parent / "results"
PRESET = "results"
BASE, NOVEL, _ = AP50
KINDS = {
    "students": ("o", "#00796b", "zero-shot, on proposals"),
    "detectors": ("s", "#ef6c00", "detector, trained on base categories"),
}
"""Marker, color and title of each table's rows."""
BOUNDS = {"random": "#757575", "detector-supervised": "#757575"}


@dataclass(frozen=True)
class Point:
    """A method: mean and standard deviation over the seeds, percent, of base and of novel categories."""

    key: str
    title: str
    table: str
    base: tuple[float, float]
    novel: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--world", choices=sorted(WORLDS), default="fair", help="which dataset")
    parser.add_argument("--finished", type=Path, default=FINISHED, help="folder of the finished rows")
    parser.add_argument("--write", type=Path, default=Path("docs/images/results.svg"), help="SVG file")
    options = parser.parse_args()
    points, seeds = from_rows(options.finished / options.world, options.world)
    note = f"dataset {options.world}, {seeds} seeds; points: mean, lines: standard deviation"
    write_text(options.write, drawn(points, note))


def from_rows(folder: Path, world: str) -> tuple[list[Point], int]:
    """Returns the rows with an AP50 that most seeds have, and how many seeds these are.

    Raises:
        SystemExit: no row is finished.
    """
    rows, _ = finished_rows(folder, world, PRESET)
    found = {key: seeds for key, seeds in rows.items() if all(BASE in seed for seed in seeds.values())}
    most = max(map(len, found.values()))
    if not most:
        raise SystemExit(f"{folder}: no row with {BASE} is finished")

    def over(key: str, metric: str) -> tuple[float, float]:
        values = [100 * seed[metric] for seed in found[key].values()]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    points = [
        Point(row.key, row.title, row.table, over(row.key, BASE), over(row.key, NOVEL))
        for row in ROWS
        if len(found.get(row.key, ())) == most
    ]
    return points, most


def drawn(points: list[Point], note: str) -> str:
    """Returns the figure as SVG, the same text for the same figures."""
    with matplotlib.rc_context(
        {"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 10}
    ):
        figure = Figure(figsize=(10.5, 5.6), layout="constrained")
        axis, names = figure.subplots(1, 2, width_ratios=(5, 4))
        names.set_axis_off()
        ends = [0.0, max(point.base[0] + point.base[1] for point in points)]
        axis.plot(ends, ends, color="#bdbdbd", linewidth=1, zorder=1)
        axis.annotate(" equal", (ends[1] / 2, ends[1] / 2), color="#757575", va="top")
        numbers = {point.key: str(number) for number, point in enumerate(points, 1)}
        lines: list[tuple[str, str, str]] = []  # text, color and weight
        for kind, (marker, color, title) in KINDS.items():
            lines.append((title, color, "bold"))
            for point in (point for point in points if point.table == kind):
                shade, number = BOUNDS.get(point.key, color), numbers[point.key]
                place = (point.base[0], point.novel[0])
                errors = {"xerr": point.base[1], "yerr": point.novel[1]}
                axis.errorbar(*place, **errors, color=shade, alpha=0.25, zorder=2)
                axis.plot(*place, marker=marker, markersize=13, color=shade, zorder=3)
                axis.annotate(number, place, color="white", fontsize=8, ha="center", va="center", zorder=4)
                lines.append((f"{number}  {point.title.replace('`', '')}", "#212121", "normal"))
        for row, (text, shade, weight) in enumerate(lines):
            names.text(0, 1 - row / max(len(lines), 20), text, color=shade, va="top", weight=weight)
        axis.set_xlabel("AP50 of base categories, percent")
        axis.set_ylabel("AP50 of novel categories, percent")
        axis.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(note, fontsize=9)
        text_file = io.StringIO()
        figure.savefig(text_file, format="svg", metadata={"Date": None})
    return text_file.getvalue()


if __name__ == "__main__":
    main()
