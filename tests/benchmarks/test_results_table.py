from __future__ import annotations

import importlib.util
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


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("results", BENCHMARKS / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "results", module)
    spec.loader.exec_module(module)
    return module


def all_stages(results: ModuleType, folder: Path) -> list[Stage]:
    stages: list[Stage] = results.first_stages(folder, 3)
    return stages + results.main_stages(folder, 3) + results.ablation_stages(folder, 3)


@pytest.mark.parametrize("preset", ["results", "smoke"])
def test_every_stage_of_the_table_fits_its_job(results: ModuleType, tmp_path: Path, preset: str) -> None:
    stages = all_stages(results, tmp_path)
    assert len({stage.title for stage in stages}) == len(stages)
    for stage in stages:
        schema = plugins.schema_of(plugins.load(plugins.JOBS, stage.job))
        resolved: Any = configs.resolve(schema, shipped(stage.job, preset), stage.overrides)
        assert str(tmp_path) in json.dumps(configs.to_yaml(resolved)), stage.title


def test_no_stage_reads_what_no_earlier_stage_has_left(results: ModuleType, tmp_path: Path) -> None:
    left = {f"{tmp_path}/random"}
    for stage in all_stages(results, tmp_path):
        values = dict(pair.split("=", 1) for pair in stage.overrides)
        for key, value in values.items():
            if key != "out" and value.startswith(str(tmp_path)):
                assert any(value.startswith(place) for place in left), (stage.title, key)
        left.add(values["out"])


def test_the_tables_hold_mean_and_deviation_over_seeds_and_a_dash_where_nothing_is(
    results: ModuleType, tmp_path: Path
) -> None:
    for seed, top1 in ((0, 0.25), (1, 0.35)):
        folder = tmp_path / f"seed-{seed}" / "clip-truth"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(dict.fromkeys(results.TOP1, top1)))
    text = results.tables([tmp_path / "seed-0", tmp_path / "seed-1"])
    row = next(line for line in text.splitlines() if line.startswith("| CLIP |"))
    assert "30.0 ± 7.1 / 30.0 ± 7.1 / 30.0 ± 7.1 | – / – / – | – / – | – / – |" in row
