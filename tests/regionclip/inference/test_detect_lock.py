"""Two `detect` on one folder: the second is refused with one line, and the first one's result is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_base.storage.files import read_json

Command = Callable[..., tuple[int, str]]

RUN = "import sys; from clip_base.jobs.cli import main_regionclip; sys.exit(main_regionclip(sys.argv[1:]))"


@pytest.mark.skipif(sys.platform == "win32", reason="stops a process by a signal")
def test_a_second_detect_on_one_folder_is_refused(
    world: Path, detector_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    photos, out = world / "images" / "val", tmp_path / "found"
    arguments = [
        "detect",
        str(photos),
        f"weights={detector_file}",
        "vocabulary=cup, star",
        "resize.short=[64]",
    ]
    arguments += ["resize.long=96", "score_threshold=0.0", "draw=false"]
    assert regionclip(*arguments, f"out={tmp_path / 'alone'}")[0] == 0
    first = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments, f"out={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while not (out / ".lock.json").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        code, told = regionclip(*arguments, f"out={out}")
        assert code == 2
        assert f"error: {out} is in use by process {first.pid}, which started at" in told
        assert len(told.strip().splitlines()) == 1
        os.kill(first.pid, signal.SIGCONT)
        output, _ = first.communicate(timeout=300)
        assert first.returncode == 0, output
    finally:
        first.kill()
        first.wait()
    assert read_json(out / "detections.json") == read_json(tmp_path / "alone" / "detections.json")
    assert {path.name for path in out.iterdir()} == {"detections.json", "detections.csv"}
