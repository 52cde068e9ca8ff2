"""Mining that is told to stop saves the shard in hand, and the same command resumes in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_base.jobs.cli import main_regionclip

Swap = Callable[..., list[str]]
AfterImport = Callable[[str, str], dict[str, str]]


def command_line(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Starts `regionclip` in a process of its own, and session."""
    code = "import sys\nfrom clip_base.jobs.cli import main_regionclip as job\nsys.exit(job(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def files(folder: Path) -> dict[str, bytes]:
    """Returns a folder's tables by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


# Stands for the second batch of a shard: it is where the process is told to stop.
STOPPED = """
import os, signal

real = module.Miner._mine_batch
calls = []

def mine_batch(self, batch):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getppid() if os.environ.get("WORKERS") == "2" else os.getpid(), signal.SIGTERM)
    return real(self, batch)

module.Miner._mine_batch = mine_batch
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_told_to_stop_it_saves_the_shard_in_hand(
    mining_options: list[str],
    swapped: Swap,
    tmp_path: Path,
    after_import: AfterImport,
    patience: float,
    workers: int,
) -> None:
    out, options = tmp_path / "mined", swapped(mining_options, batch_size=1)
    command = ["mine", *options, f"out={out}", f"workers={workers}"]
    environment = after_import("regionclip.mining.miner", STOPPED)
    stopped = command_line(*command, **environment, WORKERS=str(workers))
    _, told = stopped.communicate(timeout=patience)
    assert stopped.returncode == 130, told
    assert re.search(r"shard-0000\d: [12] images are saved", told)
    assert list(out.glob(".shard-*.parts"))
    assert main_regionclip(command) == 0
    whole = tmp_path / "whole"
    assert main_regionclip(["mine", *options, f"out={whole}"]) == 0
    assert files(out) == files(whole)
