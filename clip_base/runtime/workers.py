"""Parallel work in several processes, on this machine or on a Ray cluster.

Work is a function of a task alone, so that its results are the same whichever process does it. The executors
differ in where the processes are:

- `local`: processes of this machine, each with its share of the cores; one worker works in this process.
- `ray`: actors on the Ray cluster that RAY_ADDRESS names or that runs on this machine, else on a new one
  here. Its machines must see the same files at the same paths, and the command's folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from clip_base.runtime import ray_cluster
from clip_base.runtime.work import Failure, Result, Task, Work
from clip_base.runtime.work import Report as Report

EXECUTORS = ("local", "ray")
_TO_SAVE = 30.0  # seconds that a worker which is told to stop may take to save what it has
EXECUTOR_HELP = (
    "where the processes are: local, on this machine; ray, on the Ray cluster that RAY_ADDRESS names or that "
    "runs here (its machines see the same files at the same paths)"
)
Watch = Callable[[Task, int, str], None]
Item = TypeVar("Item")
Read = TypeVar("Read")


def run(
    executor: str,
    start: Callable[[], Work[Task, Result]],
    tasks: Iterable[Task],
    workers: int = 1,
    watch: Watch[Task] | None = None,
    gpus: int = 0,
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, result) of all tasks, in the order in which they end.

    Args:
        executor: one of EXECUTORS.
        start: called once in every process, makes the function that does the work; it is sent there.
        tasks: read when a process is free.
        workers: processes; 0: one per core (ray: one per core or GPU of the cluster).
        watch: takes a task's reports; ray sends none.
        gpus: how many a worker may choose from; each takes one of them.

    Raises:
        InputError: the work raised one, or Ray is not installed.
        OSError: the work raised one.
        RuntimeError: the work failed otherwise, which the message tells, or a process was killed. Of a Ray
            cluster's workers several must have been: others do what a lost one had begun.
    """
    watch = watch or _unwatched
    if executor == "ray":
        return ray_cluster.run(start, tasks, workers, gpus)
    count = workers or cores()
    return _here(start, tasks, watch) if count == 1 else _in_processes(start, tasks, count, watch, gpus)


def cores() -> int:
    """Returns how many cores this process may use, where the system tells; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unwatched(task: object, steps: int, note: str) -> None:
    pass


def _here(
    start: Callable[[], Work[Task, Result]], tasks: Iterable[Task], watch: Watch[Task]
) -> Iterator[tuple[Task, Result]]:
    work: Work[Task, Result] | None = None
    for task in tasks:
        work = work or start()
        yield task, work(task, lambda steps, note, task=task: watch(task, steps, note))  # type: ignore[misc]


def _in_processes(
    start: Callable[[], Work[Task, Result]],
    tasks: Iterable[Task],
    workers: int,
    watch: Watch[Task],
    gpus: int,
) -> Iterator[tuple[Task, Result]]:
    context = multiprocessing.get_context("spawn")
    queue, busy = iter(tasks), dict[connection.Connection, Task]()
    pool: dict[connection.Connection, BaseProcess] = {}
    try:
        for task in queue:
            ours, theirs = context.Pipe()
            pool[ours] = context.Process(target=_serve, args=(start, theirs), daemon=True)
            with _surroundings(len(pool) - 1, workers, gpus):
                pool[ours].start()
            theirs.close()
            _send(ours, task, pool[ours])
            busy[ours] = task
            if len(pool) == workers:
                break
        while busy:
            for pipe in connection.wait(list(busy)):
                assert isinstance(pipe, connection.Connection)
                kind, value = _receive(pipe, pool[pipe])
                if kind == "report":
                    watch(busy[pipe], *value)
                elif kind == "failed":
                    raise value.again()
                else:
                    yield busy.pop(pipe), value
                    for task in queue:
                        _send(pipe, task, pool[pipe])
                        busy[pipe] = task
                        break
    finally:
        for process in pool.values():
            process.terminate()
        for process in pool.values():
            process.join(_TO_SAVE)
            if process.is_alive():
                process.kill()
                process.join()


def _send(pipe: connection.Connection, task: object, process: BaseProcess) -> None:
    try:
        pipe.send(task)
    except OSError:
        raise _killed(process) from None


def _receive(pipe: connection.Connection, process: BaseProcess) -> tuple[str, Any]:
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError):
        raise _killed(process) from None
    return kind, value


def _killed(process: BaseProcess) -> RuntimeError:
    process.join(5)
    code = process.exitcode
    how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
    return RuntimeError(f"a worker process ended {how} (out of memory?); the same command resumes it")


@contextlib.contextmanager
def _surroundings(index: int, workers: int, gpus: int) -> Iterator[None]:
    """Sets what a process inherits that is started meanwhile.

    Its share of the cores: threads of several processes that wait for each other slow all of them down many
    times. One of the GPUs. And Ctrl-C, which the terminal sends to all processes at once, is for the first
    one alone, which then ends the others.
    """
    threads = max(1, cores() // workers)
    changes = {"OMP_NUM_THREADS": str(min(threads, int(os.environ.get("OMP_NUM_THREADS") or threads)))}
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        visible = visible if visible != [""] else [str(gpu) for gpu in range(gpus)]
        changes["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]
    before = {key: os.environ.get(key) for key in changes}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    os.environ.update(changes)
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _serve(start: Callable[[], Work[Any, Any]], pipe: connection.Connection) -> None:
    """Runs in a worker process until the pipe closes, so that the worker of a killed parent ends itself."""

    def tell(kind: str, value: object) -> None:
        try:
            pipe.send((kind, value))
        except OSError:
            os._exit(1)

    # Work that is told to stop may save what it has: it ends by SystemExit, not at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    work: Work[Any, Any] | None = None
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            work = work or start()
            result = work(task, lambda steps, note: tell("report", (steps, note)))
        except Exception as error:
            tell("failed", Failure.of(error))
            return
        tell("done", result)


def _end_with(sentinel: int) -> None:
    """Ends this process as soon as its parent is gone, in the middle of a task too."""
    connection.wait([sentinel])
    os._exit(1)


def in_turn(
    read: Callable[[Item], Read], items: Iterable[Item], threads: int, ahead: int = 0
) -> Iterator[Read]:
    """Yields read(item) of each item, in order, while threads read ahead.

    Decoding and resizing run beside what is done with the results, as they hold no lock of Python's.

    Args:
        read: what is done with an item.
        items: in order.
        threads: how many.
        ahead: items that are read before they are asked for; 0: twice as many as there are threads.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Read]] = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > (ahead or 2 * threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
