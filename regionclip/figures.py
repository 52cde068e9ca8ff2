"""Charts of the report as inline SVG: drawn from numbers alone, coloured by the page's own style sheet.

Colours are CSS classes (`s1`, `s2`, …, `base`, `novel`, `right`, `wrong`, `nothing`), so that a chart follows
the page into the dark. Every text that comes from outside is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 40
MOST_POINTS = 160
MOST_COUNTS = 14  # bars of a histogram that have room for their count
DASH = "–"

Points = Sequence[tuple[float, float]]


def percent(value: float, digits: int = 1) -> str:
    """Returns a share in [0, 1] as a percentage without the sign: 41.2; a dash where nothing was measured."""
    return DASH if value < 0 else f"{100 * value:.{digits}f}"


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Returns round numbers, about `wanted` of them, the first at most `low` and the last at least `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Returns at most `most` points, each the mean of as many neighbours as it takes."""
    size = -(-len(points) // most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def line_chart(title: str, series: Mapping[str, Points], x_label: str = "step", shares: bool = False) -> str:
    """Returns a figure with a line for each name of `series`, in the order given (up to four).

    Args:
        title: what is shown.
        series: name -> (x, y) in order of x; not a number is left out.
        x_label: what x counts.
        shares: y holds shares in [0, 1]; the axis then shows all of 0 to 100 %.
    """
    lines = {name: thinned([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    points = [point for line in lines.values() for point in line]
    if not points:
        return _figure(title, _frame([], []), list(lines))
    ys = [y for _, y in points]
    right = max(x for line in series.values() for x, _ in line) or 1.0
    y_ticks, x_ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if shares else ticks(min(ys), max(ys)), ticks(0, right)
    bottom, top = y_ticks[0], y_ticks[-1]
    x_ticks = [x for x in x_ticks if x <= right * 1.001]

    def x_of(x: float) -> float:
        return LEFT + x / right * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    labels = [f"{100 * y:.0f} %" if shares else _short(y) for y in y_ticks]
    levels = [(y_of(y), label) for y, label in zip(y_ticks, labels, strict=True)]
    body = [_frame(levels, [(x_of(x), _short(x)) for x in x_ticks])]
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label))
    for number, line in enumerate(lines.values(), start=1):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        body.append(f'<polyline class="line s{number}" points="{path}"/>')
        if len(line) == 1:  # which a line would not show
            x, y = line[0]
            body.append(f'<circle class="fill s{number}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4"/>')
    legend = {name: f"s{number}" for number, name in enumerate(lines, start=1)}
    return _figure(title, "".join(body), legend)


def grouped_bars(title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """Returns a figure with bars side by side, from 0 to 100 %.

    Args:
        title: what is shown.
        groups: labels along the axis.
        series: CSS class, which is the name too -> a share in [0, 1] for each group; negative: not measured.
    """
    body = [_frame([(_y_of_share(share / 4), f"{25 * share} %") for share in range(5)], [])]
    room = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    wide = min(46.0, room * 0.7 / max(len(series), 1))
    for place, group in enumerate(groups):
        middle = LEFT + room * (place + 0.5)
        body.append(_text(middle, HEIGHT - BOTTOM + 18, group))
        for number, (name, values) in enumerate(series.items()):
            left = middle + (number - len(series) / 2) * (wide + 4) + 2
            value = values[place]
            body.append(_bar(left, wide, 0, max(value, 0), name))
            body.append(_text(left + wide / 2, _y_of_share(max(value, 0)) - 4, percent(value), "value"))
    return _figure(title, "".join(body), {name: name for name in series})


def stacked_bars(
    title: str, bins: Sequence[str], shares: Mapping[str, tuple[str, Sequence[float]]], counts: Sequence[int]
) -> str:
    """Returns a figure with one bar a bin, divided into shares.

    Args:
        title: what is shown.
        bins: labels along the axis.
        shares: name -> (CSS class, a share in [0, 1] for each bin), from the bottom up.
        counts: how many things each bin holds; written under it. An empty bin has no bar.
    """
    body = [_frame([(_y_of_share(share / 4), f"{25 * share} %") for share in range(5)], [])]
    room = (WIDTH - LEFT - RIGHT) / max(len(bins), 1)
    for place, (label, count) in enumerate(zip(bins, counts, strict=True)):
        middle, base = LEFT + room * (place + 0.5), 0.0
        body.append(_text(middle, HEIGHT - BOTTOM + 16, label))
        body.append(_text(middle, HEIGHT - BOTTOM + 32, _short(count), "faint"))
        for style, values in shares.values() if count else ():
            body.append(_bar(middle - room * 0.4, room * 0.8, base, base + values[place], style))
            base += values[place]
    return _figure(title, "".join(body), {name: style for name, (style, _) in shares.items()})


def histogram(title: str, bins: Sequence[str], counts: Sequence[int], x_label: str = "") -> str:
    """Returns a figure with one bar a bin, as high as its count, which is written on it if there is room.

    Args:
        title: what is shown.
        bins: labels along the axis.
        counts: how many things each bin holds.
        x_label: what the bins are of.
    """
    levels = ticks(0, max([*counts, 1]))
    body = [_frame([(_y_of_share(level / levels[-1]), _short(level)) for level in levels], [])]
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label))
    room = (WIDTH - LEFT - RIGHT) / max(len(bins), 1)
    for place, (label, count) in enumerate(zip(bins, counts, strict=True)):
        middle, share = LEFT + room * (place + 0.5), count / levels[-1]
        body.append(_text(middle, HEIGHT - BOTTOM + 16, label))
        body.append(_bar(middle - room * 0.4, room * 0.8, 0, share, "s1"))
        if count and len(bins) <= MOST_COUNTS:
            body.append(_text(middle, _y_of_share(share) - 4, _short(count), "value"))
    return _figure(title, "".join(body), {})


def _y_of_share(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _bar(left: float, wide: float, low: float, high: float, style: str) -> str:
    top, bottom = _y_of_share(high), _y_of_share(low)
    return (
        f'<rect class="fill {escape(style)}" x="{left:.1f}" y="{top:.1f}" '
        f'width="{wide:.1f}" height="{max(bottom - top, 0):.1f}"/>'
    )


def _frame(levels: Sequence[tuple[float, str]], marks: Sequence[tuple[float, str]]) -> str:
    """Horizontal lines with their labels at (y, label), and labels under the axis at (x, label)."""
    rules = "".join(
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{escape(label)}</text>'
        for y, label in levels
    )
    return rules + "".join(_text(x, HEIGHT - BOTTOM + 16, label) for x, label in marks)


def _text(x: float, y: float, text: str, style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _short(value: float) -> str:
    """1500 -> 1.5k; no more digits than a label has room for."""
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"


def _figure(title: str, body: str, legend: Mapping[str, str] | Sequence[str]) -> str:
    styles = legend if isinstance(legend, Mapping) else dict.fromkeys(legend, "nothing")
    keys = "".join(
        f'<span class="key"><i class="swatch {escape(style)}"></i>{escape(name)}</span>'
        for name, style in styles.items()
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
        f'<div class="keys">{keys}</div></figure>'
    )
