"""Two processes on one folder: one of them is refused, and a dead one's lock is free."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_base.runtime.errors import InputError
from clip_base.storage.lock import lock_file, lock_folder, releasing_locks

HOLD = """
import sys, time
from pathlib import Path
from clip_base.storage.lock import lock_file, lock_folder
kind, path, part = sys.argv[1:]
held = lock_folder(path, part) if kind == "folder" else lock_file(path)
print("held", flush=True)
time.sleep(600)
"""


class Holder:
    """Another process that holds a lock until it is killed."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def __call__(self, path: Path, part: str = "", kind: str = "folder") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, kind, str(path), part]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process


@pytest.fixture
def hold() -> Iterator[Holder]:
    holder = Holder()
    yield holder
    for process in holder.processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path: Path, hold: Holder) -> None:
    process = hold(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        lock_folder(tmp_path / "out")
    told = str(caught.value)
    assert f"{tmp_path / 'out'} is in use by process {process.pid}, which started at 20" in told
    assert "another out=" in told
    assert "\n" not in told
    assert lock_folder(tmp_path / "other").is_held


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, hold: Holder) -> None:
    process = hold(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lock = lock_folder(tmp_path)
    assert lock.is_held
    assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()


def test_parts_of_one_division_go_together_and_nothing_else(tmp_path: Path, hold: Holder) -> None:
    hold(tmp_path, "1-of-2")
    assert lock_folder(tmp_path, "2-of-2").is_held
    for part in ("1-of-2", "2-of-3", ""):
        with pytest.raises(InputError, match="in use by process"):
            lock_folder(tmp_path, part)


def test_a_folder_that_is_locked_whole_has_no_free_part(tmp_path: Path, hold: Holder) -> None:
    hold(tmp_path)
    with pytest.raises(InputError, match="in use by process"):
        lock_folder(tmp_path, "1-of-2")


def test_a_file_is_locked_beside_it(tmp_path: Path, hold: Holder) -> None:
    hold(tmp_path / "pool.jsonl", kind="file")
    with pytest.raises(InputError, match=r"pool\.jsonl is in use by process"):
        lock_file(tmp_path / "pool.jsonl")
    assert lock_file(tmp_path / "other.jsonl").is_held
    assert not (tmp_path / "pool.jsonl").exists()


def test_one_process_may_ask_again_and_lets_go_at_the_end(tmp_path: Path, hold: Holder) -> None:
    first = lock_folder(tmp_path)
    assert lock_folder(tmp_path / ".." / tmp_path.name) is first
    with releasing_locks():
        other = lock_folder(tmp_path / "inner")
        assert lock_folder(tmp_path) is first
    assert first.is_held
    assert not other.is_held
    del first
    gc.collect()
    hold(tmp_path)  # it gets it


def test_a_forked_process_does_not_hold_its_parents_lock(tmp_path: Path, hold: Holder) -> None:
    lock, (ours, theirs) = lock_folder(tmp_path), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(theirs)
        os.read(ours, 1)  # until the parent has closed its end
        os._exit(0)
    try:
        lock.release()
        hold(tmp_path)
    finally:
        os.close(theirs)
        os.waitpid(child, 0)
        os.close(ours)


def test_what_dead_processes_were_writing_is_swept_and_nothing_else(tmp_path: Path, hold: Holder) -> None:
    other = hold(tmp_path / "other")
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    left = [out / f".a.json.{dead.pid}.tmp", out / "inner" / f".b.json.{dead.pid}.tmp"]
    left.append(out / f".before-a-restart.json.{os.getpid()}.tmp")
    kept = [f".a.json.{other.pid}.tmp", f"a.json.{dead.pid}.tmp", ".a.tmp", f".now.json.{os.getpid()}.tmp"]
    for path in [*left, *(out / name for name in kept)]:
        path.write_text("half")
    os.utime(left[-1], (0, 0))
    assert lock_folder(out).is_held
    assert not any(path.exists() for path in left)
    assert all((out / name).exists() for name in kept)
