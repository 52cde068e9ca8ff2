"""Draws the figure of docs/results.md: base and novel categories, before and after region pretraining.

    python benchmarks/results_figure.py --world fair --write docs/images/results.svg

Without `--world` it is drawn from the first dataset, whose figures are in docs/results_appendix.md.
"""

from __future__ import annotations

import argparse
import io
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from results_steps import WORLDS
from results_tables import finished_rows

from clip_base.storage.files import write_text

FINISHED = Path(__file__).parent / "results"
PRESET = "results"
Bars = list[tuple[float, float]]  # mean and standard deviation, percent: base, novel
PANELS = {
    "true boxes, zero-shot: top-1": (
        ("clip", "student-published", "student-best"),
        ("top1_base", "top1_novel"),
    ),
    "detectors initialized from it: AP50": (
        ("detector-clip", "detector-published", "detector-best"),
        ("AP50_base", "AP50_novel"),
    ),
}
TITLES = ("CLIP", "RegionCLIP,\nas published", "our recipe")
FIRST: dict[str, list[Bars]] = {
    "true boxes, zero-shot: top-1": [
        [(2.8, 1.5), (10.3, 2.0)],
        [(3.1, 1.8), (11.9, 3.3)],
        [(42.3, 7.1), (42.1, 5.3)],
    ],
    "detectors initialized from it: AP50": [
        [(20.0, 2.5), (12.9, 5.4)],
        [(29.0, 4.3), (21.7, 6.9)],
        [(40.7, 7.2), (33.7, 9.0)],
    ],
}
COLORS = {"base": "#00796b", "novel": "#ef6c00"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--world", choices=sorted(WORLDS), help="draw the finished rows of this dataset")
    parser.add_argument("--finished", type=Path, default=FINISHED, help="folder of the finished rows")
    parser.add_argument("--write", type=Path, default=Path("docs/images/results.svg"), help="SVG file")
    options = parser.parse_args()
    if options.world:
        bars, seeds = from_rows(options.finished / options.world, options.world)
        note = f"dataset {options.world}, {seeds} seeds"
    else:
        bars, note = FIRST, "first dataset, 3 seeds"
    write_text(options.write, drawn(bars, f"{note}; bars: mean, lines: standard deviation"))


def from_rows(folder: Path, world: str) -> tuple[dict[str, list[Bars]], int]:
    """Returns the bars of each panel, over the seeds that have all rows of the figure.

    Raises:
        SystemExit: no seed has them all.
    """
    found, _ = finished_rows(folder, world, PRESET)
    keys = [key for rows, _ in PANELS.values() for key in rows]
    seeds = set.intersection(*(set(found[key]) for key in keys))
    if not seeds:
        raise SystemExit(f"{folder}: no seed has the rows {', '.join(keys)}")

    def spread(values: list[float]) -> tuple[float, float]:
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    bars = {
        panel: [
            [spread([100 * found[key][seed][metric] for seed in sorted(seeds)]) for metric in metrics]
            for key in rows
        ]
        for panel, (rows, metrics) in PANELS.items()
    }
    return bars, len(seeds)


def drawn(panels: dict[str, list[Bars]], note: str) -> str:
    """Returns the figure as SVG, the same text for the same figures."""
    style = {"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        for axis, (title, groups) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for part, (name, color) in enumerate(COLORS.items()):
                places = [number + (part - 0.5) * 0.36 for number in range(len(groups))]
                heights, errors = zip(*(group[part] for group in groups), strict=True)
                axis.bar(places, heights, 0.34, yerr=errors, color=color, label=name, capsize=3)
                for place, height, error in zip(places, heights, errors, strict=True):
                    axis.annotate(f"{height:.0f}", (place, height + error), ha="center", va="bottom")
            axis.set_xticks(range(len(TITLES)), TITLES)
            axis.set_title(title, fontsize=10)
            axis.margins(y=0.12)
            axis.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("percent")
        figure.axes[0].legend(title="categories", frameon=False, loc="upper left")
        figure.supxlabel(note, fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


if __name__ == "__main__":
    main()
