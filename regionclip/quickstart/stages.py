"""A sequence of jobs as timed stages that can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_base.jobs import config as configs
from clip_base.jobs import plugins
from clip_base.jobs.shipped import shipped_folder
from clip_base.runtime.errors import InputError
from clip_base.runtime.progress import clock
from clip_base.storage.files import read_json, write_json


@dataclass(frozen=True)
class Stage:
    """One job with its overrides.

    Attributes:
        title: what it does, for the person who waits.
        job: name in the entry-point group `clip_base.jobs`.
        minutes: what it takes on the machine of `pace.REFERENCE`, for the estimate of the remaining time.
        overrides: `key=value`, on top of configs/JOB/PRESET.yaml.
    """

    title: str
    job: str
    minutes: float
    overrides: tuple[str, ...]


def shipped(job: str, name: str) -> Path:
    """Returns the config file configs/JOB/NAME.yaml that comes with the project.

    Raises:
        InputError: there is no such file.
    """
    path = shipped_folder() / job / f"{name}.yaml"
    if not path.exists():
        known = sorted(path.stem for path in path.parent.glob("*.yaml"))
        raise InputError(f"there is no configs/{job}/{name}.yaml; known: {', '.join(known) or 'none'}")
    return path


def run_stages(stages: Sequence[Stage], preset: str, path: Path, pace: float = 1.0) -> dict[str, float]:
    """Runs stages one after another; one that has ended before returns at once.

    Args:
        stages: what to run; their titles differ.
        preset: which of configs/JOB/PRESET.yaml the jobs use.
        path: JSON file that keeps how long each stage took, by title; read again by a restarted run.
        pace: how many times as long as expected stages are taken to need until some have ended.

    Returns:
        The seconds of each stage, by title.
    """
    timings: dict[str, float] = read_json(path, "timings") if path.exists() else {}
    expected_pace = pace
    for number, stage in enumerate(stages, 1):
        left = sum(later.minutes for later in stages[number - 1 :] if later.title not in timings) * pace * 60
        print(
            f"[{number}/{len(stages)}] {stage.title}"
            + (f" (about {clock(left)} left in all)" if left else ""),
            flush=True,
        )
        seconds = _run(stage, preset)
        if stage.title not in timings:
            timings[stage.title] = round(seconds, 1)
            write_json(path, timings, indent=2)
            known = [one for one in stages if one.title in timings]
            # Two expected minutes weigh in, so that one short stage does not decide the estimate.
            measured, expected = sum(timings[one.title] for one in known), sum(one.minutes for one in known)
            pace = (measured / 60 + 2 * expected_pace) / (expected + 2)
    return timings


def _run(stage: Stage, preset: str) -> float:
    """Runs a stage's job and returns how many seconds it took; a finished job returns at once."""
    job: Callable[[Any], None] = plugins.load(plugins.JOBS, stage.job)
    resolved: Any = configs.resolve(plugins.schema_of(job), shipped(stage.job, preset), stage.overrides)
    start = time.monotonic()
    job(resolved)
    return time.monotonic() - start
