"""Every job, killed at random moments and started again, leaves what an undisturbed run does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
KILLS = Path(__file__).with_name("kills.py")


@pytest.mark.slow
def test_killed_jobs_end_as_undisturbed_ones(patience: float) -> None:
    command = [sys.executable, str(KILLS), "--kills", "3", "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    assert ended.returncode == 0, ended.stderr
    assert "| **all** | " in ended.stdout


@pytest.mark.slow
def test_what_a_kill_would_leave_is_found(tmp_path: Path) -> None:
    from kills import content, differences

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(f'{{"loss": 1, "seconds": {len(name)}{ord(name)}}}')
        (tmp_path / name / "same.csv").write_text("x")
    whole = content(tmp_path / "a")
    assert differences(whole, content(tmp_path / "b")) == []
    (tmp_path / "b" / ".log.17.tmp").write_text("")
    (tmp_path / "b" / "metrics.json").write_text('{"loss": 2}')
    (tmp_path / "b" / "same.csv").unlink()
    assert differences(whole, content(tmp_path / "b")) == [
        "same.csv is missing",
        ".log.17.tmp is left",
        "metrics.json differs",
    ]
