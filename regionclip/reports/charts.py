"""Charts as inline SVG, drawn by matplotlib.

Colors are the style sheet's, so that a chart follows the page into dark mode; texts stay texts, in the page's
font; the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from regionclip.reports.html import percent

WIDTH, HEIGHT = 460, 250  # units of the SVG; texts have 12
MAX_POINTS = 160
MAX_COUNTS = 14  # bars of a histogram that have room for their count
PALETTE = ("blue", "orange", "teal", "violet", "green", "red", "gray")

Points = Sequence[tuple[float, float]]

# matplotlib is given a code for each custom property of the style sheet, which then replaces it in the SVG.
_CODES = {name: f"#abcd{place:02x}" for place, name in enumerate((*PALETTE, "ink", "muted", "rule"))}
_NAMES = {code: name for name, code in _CODES.items()}
_CODE = re.compile("|".join(_NAMES))
_SVG = "{http://www.w3.org/2000/svg}"
KEPT = ("viewBox", "d", "x", "y", "transform")  # attributes, beside the style
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _CODES["ink"],
    "axes.labelcolor": _CODES["muted"],
    "xtick.color": _CODES["muted"],
    "ytick.color": _CODES["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 5,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _CODES["rule"],
    "axes.axisbelow": True,
    "axes.ymargin": 0,
}


@dataclass(frozen=True)
class Chart:
    """A chart, ready for a page.

    Attributes:
        title: what is shown.
        svg: an <svg> element.
        legend: name -> the color that stands for it, one of PALETTE.
    """

    title: str
    svg: Markup
    legend: Mapping[str, str]


@matplotlib.rc_context(_STYLE)
def line_chart(
    title: str, series: Mapping[str, Points], x_label: str = "step", shares: bool = False
) -> Chart:
    """Returns a chart with one line for each name, in the order of PALETTE.

    Args:
        title: what is shown.
        series: name -> (x, y) in order of x; y that is not finite is left out.
        x_label: what x counts.
        shares: y holds shares in [0, 1]; the axis then shows all of 0 to 100 %.
    """
    axes, colors = _axes(x_label), _colors(series, PALETTE)
    for name, points in series.items():
        line = thinned([point for point in points if math.isfinite(point[1])])
        is_point = len(line) == 1  # drawn as a line of no length, it shows as a dot, by its round ends
        xs, ys = [x for x, _ in line], [y for _, y in line]
        style: Any = {"linewidth": 8 if is_point else 2, "solid_capstyle": "round"}
        axes.plot(xs * (1 + is_point), ys * (1 + is_point), color=_CODES[colors[name]], **style)
    axes.set_xlim(0, max((points[-1][0] for points in series.values() if points), default=1) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(short)
    _share_axis(axes) if shares else _value_axis(axes)
    return _chart(title, axes, colors)


@matplotlib.rc_context(_STYLE)
def share_bars(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    stacked: bool = False,
    colors: Sequence[str] = PALETTE,
) -> Chart:
    """Returns a chart with bars from 0 to 100 %.

    Args:
        title: what is shown.
        labels: of the groups of bars.
        series: name -> a share in [0, 1] for each label; negative: not measured.
        stacked: bars stand on top of each other, else side by side with their figures.
        colors: of the names, from PALETTE.
    """
    axes, legend = _axes(), _colors(series, colors)
    width = 0.8 if stacked else 0.7 / max(len(series), 1)
    bottoms = [0.0] * len(labels)
    for number, (name, values) in enumerate(series.items()):
        offset = 0 if stacked else (number - (len(series) - 1) / 2) * width
        heights = [max(value, 0) for value in values]
        places = [place + offset for place in range(len(labels))]
        bars = axes.bar(places, heights, width * 0.95, bottoms, color=_CODES[legend[name]])
        if stacked:
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
        else:
            axes.bar_label(bars, [percent(value) for value in values], padding=2, fontsize=11.5)
    axes.set_xticks(range(len(labels)), labels, fontsize=11)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    _share_axis(axes)
    return _chart(title, axes, legend)


@matplotlib.rc_context(_STYLE)
def histogram(title: str, bins: Sequence[str], counts: Sequence[int], x_label: str) -> Chart:
    """Returns a chart with one bar per bin, as high as its count, which is written on it if there is room.

    Args:
        title: what is shown.
        bins: labels along the axis.
        counts: number of things in each bin.
        x_label: what the bins are of.
    """
    axes = _axes(x_label)
    bars = axes.bar(range(len(bins)), counts, 0.8, color=_CODES[PALETTE[0]])
    if len(bins) <= MAX_COUNTS:
        texts = [short(number) if number else "" for number in counts]
        axes.bar_label(bars, texts, padding=2, fontsize=11.5)
    axes.set_xticks(range(len(bins)), bins)
    axes.set_xlim(-0.6, len(bins) - 0.4)
    axes.set_ylim(0, max([*counts, 1]))
    _value_axis(axes, integer=True)
    return _chart(title, axes, {})


def thinned(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Returns at most `most` points, each the mean of as many neighbors as it takes."""
    size = -(-len(points) // most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _axes(x_label: str = "") -> Axes:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    axes = figure.add_axes((46 / WIDTH, 44 / HEIGHT, 1 - 58 / WIDTH, 1 - 58 / HEIGHT))
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x_label)
    return axes


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _value_axis(axes: Axes, integer: bool = False) -> None:
    """Lets the axis begin and end at round numbers."""
    ticks = MaxNLocator(5, integer=integer).tick_values(*axes.get_ylim())
    axes.set_yticks(ticks, [short(tick) for tick in ticks])
    axes.set_ylim(ticks[0], ticks[-1])


def short(value: float, _: object = None) -> str:
    """Returns a number as a label: 1.5k for 1500, no more digits than a label has room for."""
    return f"{value / 1000:.3g}k" if abs(value) >= 1000 else f"{value:.3g}"


def _colors(names: Iterable[str], palette: Sequence[str]) -> dict[str, str]:
    """Returns each name's color.

    Raises:
        ValueError: there are more names than colors.
    """
    given = list(names)
    if len(given) > len(palette):
        raise ValueError(f"a chart has {len(palette)} colors, got {len(given)} names: {', '.join(given)}")
    return dict(zip(given, palette, strict=False))


def _chart(title: str, axes: Axes, legend: Mapping[str, str]) -> Chart:
    figure = axes.figure
    assert isinstance(figure, Figure)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Chart(title, _inline(written.getvalue(), title), legend)


def _inline(svg: str, title: str) -> Markup:
    """Turns an SVG file into an element of a page, in the page's colors and without what only files need.

    Ids go, for two charts would have the same ones, and with them the paths for clipping that they name:
    nothing is drawn outside the axes.
    """
    root = ElementTree.fromstring(svg)
    for place in root.findall(f"{_SVG}defs") + root.findall(f"{_SVG}metadata"):
        root.remove(place)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.text, element.tail = (element.text or "").strip(), ""
        style = element.get("style", "")
        kept = {name: element.attrib[name] for name in KEPT if name in element.attrib}
        element.attrib = kept | ({"style": _CODE.sub(_property, style)} if style else {})
    root.attrib |= {"role": "img", "aria-label": title}
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _property(code: re.Match[str]) -> str:
    return f"var(--{_NAMES[code[0]]})"
