"""How jobs end when they are told to, when there is no room, and when another process of the run is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from clip_base.storage.files import read_json

AfterImport = Callable[[str, str], dict[str, str]]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

RUN = "import sys; from clip_base.jobs import cli; sys.exit(getattr(cli, sys.argv[1])(sys.argv[2:]))"
LIMITED = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)); {RUN}"
TINY = [
    "tower.embed_dim=16",
    "tower.vision.kind=vit",
    "tower.vision.layers=[1]",
    "tower.vision.width=32",
    "tower.vision.head_width=16",
    "tower.vision.patch=16",
    "tower.vision.resolution=32",
    "tower.text.width=32",
    "tower.text.heads=2",
    "tower.text.layers=1",
    "tower.text.context_length=12",
    "train.batch_size=4",
    "train.workers=0",
    "train.device=cpu",
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Four captioned images."""
    rows = ["image,caption"]
    for index in range(4):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((40, 40, 3), 60 * index, np.uint8))
        rows.append(f"{index}.png,image {index}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path / "table.csv"


def training(table: Path, out: Path, *more: str) -> list[str]:
    return ["main", "pretrain", "source.name=csv", f"source.file={table}", *TINY, f"out={out}", *more]


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["main", "pretrain"], "clip_base.training.pretrain"),
        (["main_regionclip", "detect"], "torch"),
        (["main_regionclip", "mine"], "regionclip.mining.mine"),
    ],
)
def test_sigterm_while_a_job_is_loaded_is_said(
    command: list[str], module: str, after_import: AfterImport
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    environment = {**os.environ, **after_import(module, code)}
    start = [sys.executable, "-c", RUN, *command]
    ended = subprocess.run(start, env=environment, capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr == "stopped; the same command resumes from here\n"


def test_sigterm_while_the_weights_are_made_leaves_a_folder_that_resumes(
    table: Path, tmp_path: Path, after_import: AfterImport
) -> None:
    command = [sys.executable, "-c", RUN, *training(table, tmp_path / "out", "train.steps=2")]
    code = """
def stop(config, make=module.make_model):
    import os, signal
    model = make(config)
    os.kill(os.getpid(), signal.SIGTERM)
    return model

module.make_model = stop
"""
    environment = {**os.environ, **after_import("clip_base.training.pretrain", code)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "stopped; the same command resumes from here\n")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert read_json(tmp_path / "out" / "metrics.json")["steps"] == 2


@pytest.mark.parametrize("limit", [1_000_000, 9_000_000])
def test_the_limit_on_a_files_size_is_one_line_as_a_full_disk_is(
    table: Path, tmp_path: Path, limit: int
) -> None:
    """The weights (6.4 MB) are larger than the first limit, the optimizer's state than the second."""
    out = tmp_path / "out"
    code = LIMITED.replace("LIMIT, LIMIT", f"{limit}, {limit}")
    command = training(table, out, "train.steps=2")
    ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: the largest size of a file (ulimit -f) is reached while writing ")
    assert "give the same command again" in line
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert subprocess.run([sys.executable, "-c", RUN, *command], capture_output=True).returncode == 0


WRITING = """
import sys, time
from clip_base.storage.files import replacing
with replacing(sys.argv[1]) as temporary:
    print("writing", flush=True)
    time.sleep(600)
"""

KILLED = """
def lost(self, step, batch, real=module._Loop.step):
    import os, signal
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, step, batch)

module._Loop.step = lost
"""


def test_a_process_that_loses_another_says_so_in_our_words(
    table: Path, tmp_path: Path, after_import: AfterImport, patience: float
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", RUN, *training(table, tmp_path / "out", "train.steps=6")]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    group |= after_import("clip_base.training.loop", KILLED)
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, told = ranks[0].communicate(timeout=patience)
        assert ranks[1].wait(patience) == -signal.SIGKILL
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 1
    errors = [line for line in told.splitlines() if line.startswith("error")]
    assert errors == [
        "error: process 0 of 2 has lost another one, which failed or was killed (it says why, unless it was "
        "killed); the same command resumes from the last checkpoint"
    ]
    assert "Traceback" not in told


def test_what_a_killed_process_was_writing_is_swept_when_the_run_resumes(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, *training(table, out, "train.steps=1")]
    subprocess.run(command, check=True, capture_output=True)
    killed = subprocess.Popen([sys.executable, "-c", WRITING, str(out / "clip.json")], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"writing\n"
    killed.kill()
    killed.communicate()
    assert (out / f".clip.json.{killed.pid}.tmp").exists()
    (out / "checkpoints" / ".00000007.tmp").mkdir()
    (out / "metrics.json").unlink()
    subprocess.run(command, check=True, capture_output=True)
    assert not list(out.rglob("*.tmp"))
