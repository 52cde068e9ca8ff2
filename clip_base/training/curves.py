"""The curves of a training log as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clip_base.storage.files import read_log, replacing

CURVES = "curves.png"
VALIDATED = "val_"  # how the figures of a validation begin
# What stands beside the losses in a line of log.jsonl.
NO_LOSS = frozenset({"step", "lr", "images_per_second", "logit_scale", "region_text_scale", "bias"})
MOST_POINTS = 2000
LARGEST = 1e300  # what an axis can hold; NaN and infinity are not drawn


def write_curves(log: Path, picture: Path) -> bool:
    """Draws the losses, the validation if there is one, and the learning rate of a training.

    Args:
        log: `log.jsonl`.
        picture: a PNG file.

    Returns:
        Whether the log has anything to draw.
    """
    lines = read_log(log, "log") if log.exists() else []
    entries = [figures for line in lines if "step" in (figures := _figures(line))]
    steps = [entry for entry in entries if "lr" in entry]
    if not steps:
        return False
    losses = _series(steps, lambda name: name not in NO_LOSS)
    panels = [("loss", losses)]
    if len(losses) > 1:
        totals = [(step["step"], sum(v for k, v in step.items() if k not in NO_LOSS)) for step in steps]
        panels = [("loss", {"total": totals, **losses})]
    validated = _series(entries, lambda name: name.startswith(VALIDATED))
    panels += [("validation", validated)] if validated else []
    panels.append(("learning rate", _series(steps, lambda name: name == "lr")))
    figure = Figure(figsize=(7, 1 + 2.4 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        for name, points in curves.items():
            xs, ys = zip(*_thinned(points), strict=True)
            mark = "o" if len(xs) == 1 or title == "validation" else ""
            axes.plot(xs, ys, label=name.removeprefix(VALIDATED), marker=mark, markersize=3, linewidth=1.3)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if len(curves) > 1 or title == "validation":
            axes.legend(fontsize=8)
    axes.set_xlabel("step")
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _figures(line: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line of the log; a user may have edited it."""
    return {
        name: value for name, value in line.items() if type(value) in (int, float) and abs(value) < LARGEST
    }


def _series(entries: Iterable[dict[str, Any]], wanted: Any) -> dict[str, list[tuple[float, float]]]:
    """Returns the (step, value) points of each figure whose name is wanted."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name != "step" and wanted(name):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Returns every n-th point, and the last: more are not seen."""
    every = -(-len(points) // MOST_POINTS)
    return [*points[:-1:every], points[-1]]
