"""Charts: whole SVG that stands in any page, with the style sheet's colors and texts that are escaped."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from xml.etree import ElementTree

import pytest

from regionclip.reports.charts import PALETTE, Chart, histogram, line_chart, share_bars, thinned

HOSTILE = "<script>alert('$x^2')</script>"


def charts() -> list[Chart]:
    lines = {"base": [(x, 1 / (1 + x)) for x in range(500)], HOSTILE: [(3, 0.5)]}
    return [
        line_chart(HOSTILE, lines, HOSTILE),
        line_chart("shares", lines, "recall", shares=True),
        share_bars("bars", [HOSTILE, "recall"], {"base": [0.5, 0.25], "novel": [-1.0, 1.0]}),
        share_bars("bins", ["0.0", HOSTILE], {"a": [0.5, 0.0], "b": [0.5, 0.0]}, True, ("green", "red")),
        histogram("counts", ["0", HOSTILE], [2000, 0], HOSTILE),
        histogram("nothing", ["0"], [0], "of"),
        line_chart("nothing", {"x & y": [(1, math.nan), (2, math.inf)]}),
    ]


def texts(chart: Chart) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(chart.svg).iter("text")]


def test_charts_are_whole_and_ask_for_nothing_outside_themselves():
    for chart in charts():
        assert ElementTree.fromstring(chart.svg).get("aria-label") == chart.title
        assert "<script" not in chart.svg
        assert not re.search(r"https?:|url\(|href|<style| id=", chart.svg)


def test_every_color_is_a_property_of_the_style_sheet():
    sheet = (files("regionclip.reports") / "templates" / "report.css").read_text(encoding="utf-8")
    for chart in charts():
        assert not re.search(r"#[0-9a-f]{6}", chart.svg)
        used = set(re.findall(r"var\(--(\w+)\)", chart.svg)) | set(chart.legend.values())
        assert used >= {"muted", "rule"}
        for name in used:
            assert sheet.count(f"--{name}: #") == 2, "light and dark"


def test_the_same_numbers_give_the_same_bytes():
    assert [chart.svg for chart in charts()] == [chart.svg for chart in charts()]


def test_bars_carry_their_figures_and_a_dash_where_nothing_was_measured():
    bars = texts(share_bars("bars", ["precision"], {"base": [0.5], "novel": [-1.0]}))
    assert {"precision", "50.0", "–", "100 %"} <= set(bars)
    assert "1.5k" in texts(histogram("counts", ["0"], [1500], "of"))


def test_names_keep_their_colors_in_the_legend():
    chart = share_bars("bins", ["0.0"], {"correct": [0.5], "wrong": [0.5]}, True, ("green", "red"))
    assert chart.legend == {"correct": "green", "wrong": "red"}
    assert chart.svg.index("var(--green)") < chart.svg.index("var(--red)")
    with pytest.raises(ValueError, match=f"has {len(PALETTE)} colors, got 8 names"):
        line_chart("many", {str(number): [(1, 2)] for number in range(8)})


def test_a_single_point_is_drawn_though_it_makes_no_line():
    [path] = re.findall(
        r'<path d="([^"]*)" style="[^"]*var\(--blue\)', line_chart("one", {"x": [(3, 1.0)]}).svg
    )
    assert len(re.findall(r"[ML] [\d.]+ [\d.]+", path)) == 2


def test_long_curves_are_thinned_by_means():
    points = [(float(x), float(x % 2)) for x in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert {y for _, y in few} == {0.5}
