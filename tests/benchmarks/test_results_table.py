from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clip_base.jobs import config as configs
from clip_base.jobs import plugins
from regionclip.quickstart.stages import Stage, shipped

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("results", "results_rows", "results_steps", "results_students", "results_tables", "rounds")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The modules of the results, which people run by path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found: dict[str, Any] = {name: importlib.import_module(name) for name in MODULES}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize("world", ["fair", "hard"])
@pytest.mark.parametrize("preset", ["results", "smoke"])
def test_every_step_of_the_tables_fits_its_job(
    modules: dict[str, Any], tmp_path: Path, world: str, preset: str
) -> None:
    for step in modules["results_steps"].all_steps(tmp_path, world, 3).values():
        stage: Stage | None = step.stage
        if stage is None:
            continue
        schema = plugins.schema_of(plugins.load(plugins.JOBS, stage.job))
        resolved: Any = configs.resolve(schema, shipped(stage.job, preset), stage.overrides)
        assert str(tmp_path) in json.dumps(configs.to_yaml(resolved)), step.name


def test_a_row_reads_only_what_its_earlier_steps_leave(modules: dict[str, Any], tmp_path: Path) -> None:
    steps = modules["results_steps"].all_steps(tmp_path, "fair", 3)
    for row in modules["results_rows"].ROWS:
        left: set[str] = set()
        for step in modules["results_rows"].steps_of(row, steps):
            values = dict(pair.split("=", 1) for pair in step.stage.overrides) if step.stage else {}
            for key, value in values.items():
                if key != "out" and value.startswith(str(tmp_path)):
                    assert any(f"{value}/".startswith(f"{place}/") for place in left), (row.key, step.name)
            left.add(f"{tmp_path}/{step.name}")
        assert {f"{tmp_path}/{name}" for name in row.measures} <= left


def test_only_the_upper_bound_trains_on_boxes_of_novel_classes(
    modules: dict[str, Any], tmp_path: Path
) -> None:
    steps = modules["results_steps"].all_steps(tmp_path, "fair", 3)
    split = f"split={tmp_path}/all-classes/split.json"
    assert {name for name, step in steps.items() if step.stage and split in step.stage.overrides} == {
        "rpn-all",
        "detector-supervised",
    }
    evaluated = steps["detector-supervised-evaluation"].stage.overrides
    assert f"split={tmp_path}/world/split.json" in evaluated


class Jobs:
    """Stands for `run_stages`: notes which steps ran, and leaves metrics and timings."""

    def __init__(self, results: ModuleType, rows: ModuleType) -> None:
        self.ran: list[str] = []
        self.names = {name: 0.25 for row in rows.ROWS for names in row.measures.values() for name in names}
        results.run_stages = self  # type: ignore[attr-defined]

    def __call__(self, stages: list[Stage], preset: str, path: Path) -> None:
        for stage in stages:
            self.ran.append(stage.title)
            place = path.parent / stage.title / "metrics.json"
            place.parent.mkdir(parents=True)
            place.write_text(json.dumps(self.names))
        path.write_text(json.dumps(dict.fromkeys(self.ran, 1.5)))


def run(modules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[str]:
    jobs = Jobs(modules["results"], modules["results_rows"])
    places = (
        "--out",
        str(tmp_path / f"out-{len(list(tmp_path.iterdir()))}"),
        "--finished",
        str(tmp_path / "rows"),
    )
    monkeypatch.setattr(sys, "argv", ["results.py", *places, *more])
    modules["results"].main()
    return jobs.ran


def test_finished_rows_are_not_made_again_unless_their_options_change(
    modules: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = modules["results_steps"]
    asked = ("--seeds", "7", "--rows", "clip", "clip-as-trained")
    first = run(modules, tmp_path, monkeypatch, *asked)
    assert first.count("clip") == first.count("world") == 1
    row = json.loads((tmp_path / "rows" / "fair" / "seed-7" / "clip-as-trained.json").read_text())
    assert row["metrics"] == {"top1_base": 0.25, "top1_novel": 0.25, "top1": 0.25}
    assert row["seconds"] == {"world": 1.5, "clip": 1.5, "clip-as-trained-truth": 1.5}
    assert run(modules, tmp_path, monkeypatch, *asked) == []
    assert "| CLIP | 1 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 |" in capsys.readouterr().out
    monkeypatch.setitem(steps.LONGER, "fair", ("train.steps=9",))
    modules["results"].main.__globals__["run_stages"] = lambda *_: None
    monkeypatch.setattr(sys, "argv", ["results.py", "--tables", "--finished", str(tmp_path / "rows")])
    modules["results"].main()
    assert "Left out, as they were made with other options: seed-7/clip, " in capsys.readouterr().out
    assert run(modules, tmp_path, monkeypatch, *asked) == first


def test_a_difference_is_shown_by_five_agreeing_seeds_or_by_its_error(modules: dict[str, Any]) -> None:
    difference = modules["results_tables"].Difference
    assert difference((1.0, 2.0, 1.0, 30.0, 1.0)).holds
    assert not difference((1.0, 2.0, 1.0, 30.0)).holds
    assert difference((5.0, 5.5, 4.5)).holds
    assert not difference((5.0, 5.5, -4.5, 5.0, 5.0)).holds
    assert not difference((5.0,)).holds
    assert difference((-1.0, -2.0, -9.0, -3.0, -1.0)).holds
    values = difference((1.0, 3.0))
    assert (values.mean, round(values.error, 3)) == (2.0, 1.0)


def test_differences_are_paired_by_seed(modules: dict[str, Any]) -> None:
    tables, rows = modules["results_tables"], modules["results_rows"]
    found = {row.key: {} for row in rows.ROWS}
    found["student-best"] = {0: {"top1": 0.5}, 2: {"top1": 0.4}, 3: {"top1": 0.9}}
    found["student-published"] = {2: {"top1": 0.1}, 0: {"top1": 0.3}, 1: {"top1": 0.0}}
    asked = rows.Comparison("student-best", "student-published", "top1")
    assert tables.difference(found, asked).values == pytest.approx((20.0, 30.0))
    text = tables.compared(found)
    assert "| `top1` | +25.0 ± 5.0 | +20.0, +30.0 | no |" in text


def test_cells_hold_mean_and_deviation_and_a_dash_where_nothing_is(modules: dict[str, Any]) -> None:
    spread = modules["results_tables"].spread
    assert (spread([25.0, 35.0]), spread([25.0]), spread([])) == ("30.0 ± 7.1", "25.0", "–")
