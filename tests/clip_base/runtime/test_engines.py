"""Engines: results do not depend on who works, and what goes wrong elsewhere is told here."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from clip_base.runtime import workers
from clip_base.runtime.errors import InputError
from clip_base.runtime.workers import Report, run


def squares(power: int) -> Callable[[int, Report], tuple[int, str, str, bool]]:
    def work(task: int, report: Report) -> tuple[int, str, str, bool]:
        report(1, f"task {task}")
        if task == 13:
            raise InputError("13 is no number of ours")
        if task == 14:
            raise OSError(28, "No space left on device", "somewhere")
        if task == 15:
            raise ZeroDivisionError("by nothing")
        if task == 16:
            os.kill(os.getpid(), signal.SIGKILL)
        where = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return task**power, os.environ.get("OMP_NUM_THREADS", ""), where, deaf

    return work


START = functools.partial(squares, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once_and_reported(workers: int) -> None:
    told: list[tuple[int, int, str]] = []
    found = run("local", START, range(7), workers, lambda *what: told.append(what))
    assert sorted((task, result[0]) for task, result in found) == [(n, n * n) for n in range(7)]
    assert sorted(told) == [(n, 1, f"task {n}") for n in range(7)]


def test_without_tasks_nothing_is_started() -> None:
    def start() -> Callable[[int, Report], int]:
        raise AssertionError

    assert list(run("local", start, [], 1)) == []
    assert list(run("local", start, [], 2)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_read_when_somebody_is_free(workers: int) -> None:
    read = 0

    def tasks() -> Iterator[int]:
        nonlocal read
        while read < 9:
            read += 1
            yield read

    for done, _ in enumerate(run("local", START, tasks(), workers)):
        assert read <= done + 1 + workers


def test_processes_share_the_cores_and_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    found = {result[1:3] for _, result in run("local", START, range(6), 2, gpus=2)}
    assert found <= {("3", "4"), ("3", "7")}
    assert "OMP_NUM_THREADS" not in os.environ
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"


def test_each_of_several_processes_takes_the_next_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = run("local", START, range(4), 4, gpus=3)  # every process is given a task as it starts
    assert sorted(result[2] for _, result in found) == ["0", "0", "1", "2"]


def test_a_process_that_starts_does_not_hear_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert all(result[3] for _, result in run("local", START, range(2), 2))
    assert signal.getsignal(signal.SIGINT) is before


def test_processes_can_be_started_in_a_thread() -> None:
    found: list[int] = []  # there signals cannot be set
    thread = threading.Thread(target=lambda: found.extend(n for n, _ in run("local", START, range(2), 2)))
    thread.start()
    thread.join()
    assert sorted(found) == [0, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_user_can_mend_is_raised_as_it_was(workers: int) -> None:
    with pytest.raises(InputError, match="13 is no number of ours"):
        list(run("local", START, [1, 13], workers))
    with pytest.raises(OSError, match="No space left") as caught:
        list(run("local", START, [14], workers))
    assert (caught.value.errno, caught.value.filename) == (28, "somewhere")


def test_another_failure_is_told_by_its_last_line() -> None:
    with pytest.raises(RuntimeError, match="a worker failed: ZeroDivisionError: by nothing") as caught:
        list(run("local", START, [15, 1], 2))
    assert "in work" in caught.value.__notes__[0]  # the traceback, for --debug


def test_a_killed_process_is_told() -> None:
    with pytest.raises(RuntimeError, match="a worker process ended by signal 9"):
        list(run("local", START, [16, 1], 2))
