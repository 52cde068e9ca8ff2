"""Effective robustness: accuracy under a shift above what the accuracy without it predicts.

The prediction is a line through baseline models, accuracy on the shifted dataset over accuracy on the
dataset itself, both on the logit scale (arXiv 2007.00644, which arXiv 2103.00020, section 3.3, follows). The
baselines are linear probes that were trained on the dataset itself; zero-shot classifiers, which were not,
are compared with them.
"""

# M models
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clip_base.images.html import figure_png

LEAST = 2  # baselines through which a line is drawn


@dataclass(frozen=True)
class Shift:
    """A model on a dataset and on its shifted version.

    Attributes:
        model: its name.
        pair: (dataset, shifted dataset).
        probe: accuracies of the linear probe on both, trained on the first one.
        zero_shot: accuracies of zero-shot classification on both.
        images: of the smaller of both: an accuracy of 0 or 1 counts as half an image more or less.
    """

    model: str
    pair: tuple[str, str]
    probe: tuple[float, float]
    zero_shot: tuple[float, float]
    images: int


@dataclass(frozen=True)
class Baseline:
    """logit(shifted) = offset + slope * logit(accuracy)."""

    offset: float
    slope: float

    def predict(self, accuracy: float, images: int) -> float:
        """Returns the accuracy under the shift that a model of this accuracy is expected to have."""
        value = self.offset + self.slope * logit(accuracy, images)
        return float(1 / (1 + np.exp(-value)))


def logit(accuracy: float, images: int) -> float:
    """Returns the log odds; 0 and 1 are half an image off."""
    part = min(max(accuracy, 0.5 / images), 1 - 0.5 / images)
    return float(np.log(part / (1 - part)))


def baseline(shifts: Sequence[Shift]) -> Baseline | None:
    """Returns the line through the probes of several models; None: fewer than two different accuracies."""
    x = np.array([logit(one.probe[0], one.images) for one in shifts])
    y = np.array([logit(one.probe[1], one.images) for one in shifts])
    spread = float(((x - x.mean()) ** 2).sum()) if len(x) else 0.0
    if len(x) < LEAST or spread < 1e-9:
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    return Baseline(float(y.mean() - slope * x.mean()), slope)


def effective_robustness(shift: Shift, line: Baseline) -> float:
    """Returns how far a model's zero-shot accuracy under the shift is above the baselines'."""
    return shift.zero_shot[1] - line.predict(shift.zero_shot[0], shift.images)


def table(shifts: Sequence[Shift]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the cells of the table, in %; a dash where no line could be drawn."""
    header = ["model", "dataset", "shifted", "probe", "probe, shifted", "zero-shot", "zero-shot, shifted"]
    lines = []
    for shift in shifts:
        line = baseline([one for one in shifts if one.pair == shift.pair])
        effect = "–" if line is None else f"{100 * effective_robustness(shift, line):+.1f}"
        values = [f"{100 * value:.1f}" for value in (*shift.probe, *shift.zero_shot)]
        lines.append([shift.model, *shift.pair, *values, effect])
    return [*header, "effective robustness"], lines


def draw(shifts: Sequence[Shift]) -> bytes:
    """Returns a PNG with a panel per pair: shifted accuracy over accuracy, of probes and of zero-shot."""
    pairs = list(dict.fromkeys(one.pair for one in shifts))
    columns = 2 if len(pairs) == 4 else min(len(pairs), 3)
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, pair in zip(panels, pairs, strict=False):
        _panel(axes, pair, [one for one in shifts if one.pair == pair])
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    return figure_png(figure)


def _panel(axes: Axes, pair: tuple[str, str], shifts: Sequence[Shift]) -> None:
    line = baseline(shifts)
    axes.plot([0, 100], [0, 100], ":", color="tab:gray", linewidth=1, label="no loss")
    if line is not None:
        xs = np.linspace(1, 99, 99)
        ys = [100 * line.predict(x / 100, 10**6) for x in xs]
        axes.plot(xs, ys, color="tab:blue", linewidth=1, label="fit of the probes")
    for mark, color, what, points in (
        ("o", "tab:blue", "linear probe", [one.probe for one in shifts]),
        ("*", "tab:purple", "zero-shot", [one.zero_shot for one in shifts]),
    ):
        axes.plot([100 * x for x, _ in points], [100 * y for _, y in points], mark, color=color, label=what)
    axes.set_xlabel(f"{pair[0]}, %")
    axes.set_ylabel(f"{pair[1]}, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
