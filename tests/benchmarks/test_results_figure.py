"""The figure of the results: the appendix's numbers, or those of the finished rows."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which people run by path."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("results_rows", "results_steps", "results_tables", "results_figure")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["results_figure"]


def run(figure: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["results_figure.py", *words])
    figure.main()


def finish(folder: Path, seed: int, value: float, keys: tuple[str, ...] = ()) -> None:
    """Writes rows of a seed, all of them without `keys`, all metrics of which are `value`."""
    rows = importlib.import_module("results_rows")
    for row in (row for row in rows.ROWS if not keys or row.key in keys):
        metrics = {name: value for names in row.measures.values() for name in names}
        path = folder / f"seed-{seed}" / f"{row.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = rows.row_key(row, "fair", seed, "results")
        path.write_text(json.dumps({"options": options, "metrics": metrics}))


def test_finished_rows_are_drawn_with_their_spread(
    figure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = tmp_path / "fair"
    for seed, value in ((3, 0.125), (5, 0.375)):
        finish(finished, seed, value)
    points, seeds = figure.from_rows(finished, "fair")
    assert seeds == 2
    assert {point.key for point in points} >= {"random", "clip", "detector-clip", "detector-supervised"}
    assert all(point.base == point.novel == (25.0, pytest.approx(17.678, abs=1e-3)) for point in points)
    out = tmp_path / "figure.svg"
    run(figure, monkeypatch, "--world", "fair", "--finished", str(tmp_path), "--write", str(out))
    text = out.read_text()
    assert "dataset fair, 2 seeds" in text
    assert all(f"{number}  {point.title.replace('`', '')}" in text for number, point in enumerate(points, 1))


def test_only_rows_that_every_seed_has_are_drawn(figure: ModuleType, tmp_path: Path) -> None:
    bare = ("clip-as-trained",)  # has no AP50, and counts for nothing
    for seed, keys in ((0, ("clip", "random", *bare)), (1, ("clip", *bare)), (2, bare)):
        finish(tmp_path / "fair", seed, 0.25, keys)
    points, seeds = figure.from_rows(tmp_path / "fair", "fair")
    assert ([point.key for point in points], seeds) == (["clip"], 2)


def test_rows_that_are_missing_are_told(
    figure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="no row with AP50_base is finished"):
        run(figure, monkeypatch, "--world", "hard", "--finished", str(tmp_path))
