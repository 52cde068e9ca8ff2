"""Error over compute: a line through several models on logarithmic axes (arXiv 2103.00020, figure 9)."""

# M models
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch.utils.flop_counter import FlopCounterMode

from clip_base.images.html import figure_png
from clip_base.models.clip import CLIP

LEAST = 3  # models through which a line is drawn


@dataclass(frozen=True)
class PowerLaw:
    """error = factor * compute^exponent, fitted by least squares of the logarithms.

    Attributes:
        factor: the error at a compute of 1.
        exponent: negative where more compute helps.
        exponent_error: standard error of the exponent; infinite for two models.
        deviation: of the models from the line, in decades of the error (root mean square, M - 2 degrees of
            freedom); 0 for two models.
    """

    factor: float
    exponent: float
    exponent_error: float
    deviation: float


@torch.no_grad()
def gflops_per_image(model: CLIP) -> float:
    """Returns the vision tower's forward operations for one image in billions; a multiply-add is two."""
    visual = model.visual
    weight = next(visual.parameters())
    pixels = torch.zeros(1, 3, visual.resolution, visual.resolution, device=weight.device)
    with FlopCounterMode(display=False) as counter:
        visual(pixels)
    return float(counter.get_total_flops()) / 1e9


def fit(compute: Sequence[float], error: Sequence[float]) -> PowerLaw:
    """Returns the line through models.

    Args:
        compute: of each model, above 0; not all equal.
        error: of each model, above 0.
    """
    x, y = np.log10(compute), np.log10(error)
    centered = x - x.mean()
    spread = float((centered**2).sum())
    exponent = float((centered * (y - y.mean())).sum() / spread)
    offset = float(y.mean() - exponent * x.mean())
    rest = y - offset - exponent * x
    free = len(x) - 2
    deviation = float(np.sqrt((rest**2).sum() / free)) if free > 0 else 0.0
    error_of = deviation / spread**0.5 if free > 0 else float("inf")
    return PowerLaw(10**offset, exponent, error_of, deviation)


def draw(
    compute: Mapping[str, float], errors: Mapping[str, Mapping[str, float]]
) -> tuple[bytes, PowerLaw] | None:
    """Returns a PNG of the mean error over the datasets by compute, and the line; None: too few models.

    Args:
        compute: by model.
        errors: by model, the error on each dataset; the mean is over those that all models have.
    """
    common = sorted(set.intersection(*(set(own) for own in errors.values()))) if errors else []
    means = {model: float(np.mean([own[name] for name in common])) for model, own in errors.items() if common}
    models = sorted((model for model in means if means[model] > 0), key=lambda model: compute[model])
    x = np.array([compute[model] for model in models])
    if len(models) < LEAST or len(set(x.tolist())) < LEAST:
        return None
    law = fit(x.tolist(), [means[model] for model in models])
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in common:
        axes.plot(
            x, [100 * errors[model][name] for model in models], color="tab:gray", alpha=0.3, linewidth=1
        )
    axes.plot(
        x,
        [100 * means[model] for model in models],
        "o",
        color="tab:blue",
        label=f"mean of {len(common)} datasets",
    )
    for model in models:
        axes.annotate(
            model, (compute[model], 100 * means[model]), xytext=(4, 5), textcoords="offset points", fontsize=7
        )
    line = np.geomspace(x.min(), x.max(), 50)
    fitted = 100 * law.factor * line**law.exponent
    label = f"error ∝ compute^{law.exponent:.2f} ± {law.exponent_error:.2f}"
    axes.plot(line, fitted, color="tab:orange", label=label)
    band = 10**law.deviation
    axes.fill_between(line, fitted / band, fitted * band, color="tab:orange", alpha=0.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("GFLOPs per image")
    axes.set_ylabel("zero-shot error, %")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(LogFormatter(labelOnlyBase=False))  # 60, not 6 × 10¹
    axes.margins(x=0.1)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    return figure_png(figure), law
