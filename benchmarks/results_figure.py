"""Draws the figure of docs/results.md: AP50 of base against novel categories, a point per method.

python benchmarks/results_figure.py --world fair --write docs/images/results.svg
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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
CLOSE = 0.6  # of the largest AP50: where the corner that is drawn larger begins
LEFT_OUT = (
    *("-0.25", "-0.75", "-clip-0.5", "-published-0.5", "-longer-0.5", "-0.5-ensemble"),
    *("-trunk", "-trunk-ensemble"),
)
"""Ends of keys of rows that are in the tables alone: in the figure their markers would hide others."""
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
        if len(found.get(row.key, ())) == most and not row.key.endswith(LEFT_OUT)
    ]
    return points, most


def drawn(points: list[Point], note: str) -> str:
    """Returns the figure as SVG, the same text for the same figures: all points, the best, the names."""
    with matplotlib.rc_context(
        {"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 10}
    ):
        figure = Figure(figsize=(13, 5.2), layout="constrained")
        whole, top, names = figure.subplots(1, 3, width_ratios=(4, 5, 4.2))
        names.set_axis_off()
        most = 5 * math.ceil(max(max(point.base[0], point.novel[0]) for point in points) / 5 + 1)
        spread_points(whole, points, (0, most), 7, numbered=False)
        spread_points(top, points, (CLOSE * most, most), 14, numbered=True)
        corner = CLOSE * most
        whole.add_patch(
            Rectangle((corner, corner), most - corner, most - corner, fill=False, color="#9e9e9e")
        )
        top.set_title("the upper right corner", fontsize=10, color="#757575")
        lines: list[tuple[str, str, str]] = []  # text, color and weight
        for kind, (_, color, title) in KINDS.items():
            lines.append((title, color, "bold"))
            lines += [
                (f"{number}  {point.title.replace('`', '')}", "#212121", "normal")
                for number, point in enumerate(points, 1)
                if point.table == kind
            ]
        for row, (text, shade, weight) in enumerate(lines):
            names.text(0, 1 - row / max(len(lines), 20), text, color=shade, va="top", weight=weight)
        figure.supxlabel(note, fontsize=9)
        text_file = io.StringIO()
        figure.savefig(text_file, format="svg", metadata={"Date": None})
    return text_file.getvalue()


def spread_points(
    axis: Axes, points: list[Point], window: tuple[float, float], size: float, numbered: bool
) -> None:
    """Draws the points within a square window, with their standard deviations.

    Args:
        axis: takes them.
        points: all of them.
        window: the least and largest AP50.
        size: of a marker, in points.
        numbered: whether the markers hold their numbers; else only those outside the upper right corner do.
    """
    axis.plot(window, window, color="#bdbdbd", linewidth=1, zorder=1)
    for number, point in enumerate(points, 1):
        place = x, y = (point.base[0], point.novel[0])
        if min(place) < window[0]:
            continue
        marker, color, _ = KINDS[point.table]
        shade = BOUNDS.get(point.key, color)
        axis.errorbar(x, y, point.novel[1], point.base[1], color=shade, alpha=0.25, zorder=2)
        axis.plot(*place, marker=marker, markersize=size, color=shade, zorder=3)
        if numbered:
            axis.annotate(str(number), place, color="white", fontsize=8, ha="center", va="center", zorder=4)
        elif min(place) < CLOSE * window[1]:
            axis.annotate(
                str(number), place, xytext=(6, -10), textcoords="offset points", color=shade, fontsize=9
            )
    axis.set(xlim=window, ylim=window, aspect="equal")
    axis.set_xlabel("AP50 of base categories, percent")
    axis.set_ylabel("AP50 of novel categories, percent")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
