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


def test_the_first_dataset_has_the_numbers_of_the_appendix(figure: ModuleType) -> None:
    appendix = (ROOT / "docs" / "results_appendix.md").read_text(encoding="utf-8")
    for groups in figure.FIRST.values():
        for base, novel in groups:
            assert f"| {base[0]} ± {base[1]} / {novel[0]} ± {novel[1]} / " in appendix


def test_finished_rows_are_drawn_with_their_spread(
    figure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = tmp_path / "fair"
    rows = importlib.import_module("results_rows")
    for seed, value in ((3, 0.125), (5, 0.375)):
        for row in rows.ROWS:
            metrics = {name: value for names in row.measures.values() for name in names}
            path = finished / f"seed-{seed}" / f"{row.key}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            options = rows.row_key(row, "fair", seed, figure.PRESET)
            path.write_text(json.dumps({"options": options, "metrics": metrics}))
    bars, seeds = figure.from_rows(finished, "fair")
    assert seeds == 2
    assert all(
        bar == (25.0, pytest.approx(17.678, abs=1e-3))
        for groups in bars.values()
        for group in groups
        for bar in group
    )
    out = tmp_path / "figure.svg"
    run(figure, monkeypatch, "--world", "fair", "--finished", str(tmp_path), "--write", str(out))
    text = out.read_text()
    assert text.count(">25<") == 12
    assert "dataset fair, 2 seeds" in text


def test_rows_that_are_missing_are_told(
    figure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="no seed has the rows clip, student-published"):
        run(figure, monkeypatch, "--world", "hard", "--finished", str(tmp_path))
