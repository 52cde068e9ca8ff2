"""The scripts under tools/ run by path and pass their arguments on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "tools"
TOOLS = sorted(ROOT.glob("*.py"))


def run(tool: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_every_tool_explains_itself(tool: Path) -> None:
    done = run(tool, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout.lower()
    # On a slow machine whose cache of options is empty, the first help says what it waits for.
    assert not [line for line in done.stderr.splitlines() if not line.startswith("importing ")]


def test_a_tool_called_badly_ends_with_code_two() -> None:
    done = run(ROOT / "evaluate_ovd.py", "--no-such-option", "1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "there is no option 'no_such_option'" in done.stderr


def test_there_are_tools() -> None:
    assert len(TOOLS) >= 5
