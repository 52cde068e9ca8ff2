"""The quickstart as a person types it: whole, again, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs import config as configs
from clip_base.jobs import plugins
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from regionclip.quickstart import run
from regionclip.quickstart import stages as quickstart_stages
from regionclip.quickstart.pace import measure_pace
from regionclip.quickstart.run import QuickstartConfig, stages
from regionclip.quickstart.stages import Stage, run_stages, shipped

RUN = "import sys; from clip_base.jobs.cli import main_regionclip; sys.exit(main_regionclip(sys.argv[1:]))"
WAIT = 1800.0  # seconds until a test gives up on a child: a guard against hanging, no measure of speed


def start(out: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-c", RUN, "quickstart", "preset=smoke", f"out={out}", "seed=1"]
    with (out.parent / "log").open("a") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


def finish(out: Path) -> str:
    process = start(out)
    try:
        told, _ = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert process.returncode == 0, (out.parent / "log").read_text()[-2000:]
    return told


def metrics(out: Path) -> dict[str, Any]:
    """Returns the metrics of every stage; they hold no times."""
    files = sorted(path for path in out.rglob("metrics.json") if path.parent != out)
    return {str(path.parent.relative_to(out)): read_json(path) for path in files}


def table(told: str) -> list[str]:
    """Returns the rows of the result table."""
    return [line for line in told.splitlines() if "│" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run: its folder, and what it said."""
    out = tmp_path_factory.mktemp("undisturbed") / "quickstart"
    return out, finish(out)


@pytest.mark.slow
def test_the_whole_path_ends_with_a_table_and_a_page(whole: tuple[Path, str]) -> None:
    out, told = whole
    assert (out / "report.html").exists()
    assert table(told)
    for stage in stages(QuickstartConfig(str(out), 1, preset="smoke")):
        assert stage.title in told
    found = metrics(out)
    for name in ("clip", "rpn", "mined", "regionclip", "detector-clip", "detector-regionclip"):
        assert name in found
    for model in ("clip", "regionclip"):
        assert 0 <= found[f"evaluation/{model}-truth"]["top1_novel"] <= 1
        assert found[f"evaluation/detector-{model}"]["AP50_all"] >= 0
    assert set(read_json(out / "timings.json")) == {
        stage.title for stage in stages(QuickstartConfig(str(out), 1, preset="smoke"))
    }


@pytest.mark.slow
def test_a_second_call_trains_nothing_and_shows_the_same_table(whole: tuple[Path, str]) -> None:
    out, told = whole
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = finish(out)
    assert table(again) == table(told)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == weights


@pytest.mark.slow
def test_killed_while_training_and_started_again_it_ends_with_the_same_figures(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "quickstart"
    process, begin = start(out), time.monotonic()
    begun = out / "rpn" / "config.yaml"
    try:
        while not begun.exists() and process.poll() is None and time.monotonic() - begin < WAIT:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert begun.exists()
    assert not (out / "rpn" / "metrics.json").exists()
    told = finish(out)
    assert metrics(out) == metrics(whole[0])
    assert table(told) == table(whole[1])


def test_every_stage_fits_its_job(tmp_path: Path) -> None:
    for preset, size in (("quickstart", "full"), ("quickstart", "small"), ("smoke", "full")):
        for stage in stages(QuickstartConfig(str(tmp_path), 3, preset=preset), size):
            schema = plugins.schema_of(plugins.load(plugins.JOBS, stage.job))
            resolved: Any = configs.resolve(schema, shipped(stage.job, preset), stage.overrides)
            held = json.dumps(configs.to_yaml(resolved))
            assert str(tmp_path) in held, stage.title


def test_no_stage_reads_what_no_earlier_stage_has_left(tmp_path: Path) -> None:
    left: set[str] = set()
    for stage in stages(QuickstartConfig(str(tmp_path), 0, preset="smoke")):
        values = dict(pair.split("=", 1) for pair in stage.overrides)
        own = values["out"]
        for key, value in values.items():
            if key != "out" and value.startswith(str(tmp_path)):
                assert any(value.startswith(place) for place in left), (stage.title, key)
        left.add(own)


def test_a_preset_that_does_not_exist_is_named(tmp_path: Path) -> None:
    from regionclip.quickstart.run import quickstart

    with pytest.raises(InputError, match=r"there is no configs/scenes/fast\.yaml; known: .*smoke"):
        quickstart(QuickstartConfig(str(tmp_path / "out"), 0, preset="fast"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many times as long as the reference this machine takes; it can be measured once."""

    def is_slow(pace: float) -> None:
        measured = [pace]
        monkeypatch.setattr(run, "measure_pace", measured.pop)

    return is_slow


@pytest.mark.parametrize(("pace", "size"), [(1.0, "full"), (4.0, "small")])
def test_a_slow_machine_takes_the_small_size_says_so_and_keeps_to_it(
    machine: Callable[[float], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pace: float,
    size: str,
) -> None:
    machine(pace)
    config, path = QuickstartConfig(str(tmp_path)), tmp_path / "pace.json"
    assert run.chosen_size(config, path) == (pace, size)
    assert ("size=full" in capsys.readouterr().out) == (size == "small")
    assert run.chosen_size(config, path) == (pace, size)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given", ["full", "small"])
def test_the_size_that_is_asked_for_is_made(
    machine: Callable[[float], None], tmp_path: Path, given: str
) -> None:
    machine(4.0)
    config = QuickstartConfig(str(tmp_path), size=given)
    assert run.chosen_size(config, tmp_path / "pace.json") == (4.0, given)


def test_other_presets_have_one_size(machine: Callable[[float], None], tmp_path: Path) -> None:
    machine(9.0)
    config = QuickstartConfig(str(tmp_path), preset="smoke")
    assert run.chosen_size(config, tmp_path / "pace.json") == (9.0, "full")
    with pytest.raises(InputError, match="size=small is for preset=quickstart"):
        QuickstartConfig(str(tmp_path), size="small", preset="smoke")
    with pytest.raises(InputError, match="size must be one of auto, full, small, found 'tiny'"):
        QuickstartConfig(str(tmp_path), size="tiny")


def test_the_small_size_takes_less_of_everything_that_takes_long(tmp_path: Path) -> None:
    config = QuickstartConfig(str(tmp_path))
    for full, small in zip(stages(config), stages(config, "small"), strict=True):
        assert small.minutes < full.minutes
        schema = plugins.schema_of(plugins.load(plugins.JOBS, full.job))
        most: Any = configs.resolve(schema, shipped(full.job, "quickstart"), full.overrides)
        fewer: Any = configs.resolve(schema, shipped(small.job, "quickstart"), small.overrides)
        if hasattr(most, "train"):
            assert fewer.train.steps < most.train.steps


def test_the_first_estimate_is_that_of_the_pace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart_stages, "_run", lambda *_: 60.0)
    two = [Stage(title, "scenes", 1.0, ()) for title in ("first", "second")]
    run_stages(two, "smoke", tmp_path / "timings.json", pace=3.0)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "[1/2] first (about 6 min 00 s left in all)"
    # One minute measured where three were expected, with two expected minutes more at the old pace.
    assert told[1] == "[2/2] second (about 2 min 20 s left in all)"


def test_a_pace_is_measured() -> None:
    assert measure_pace() > 0
