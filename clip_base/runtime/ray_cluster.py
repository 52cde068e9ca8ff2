"""Work on a Ray cluster, by actors that each load what they need once.

Actors of Ray's core, not Ray Data: that holds the tasks before the first one begins, among which are all
captions of a dataset, and its writer cuts and names files as its blocks happen to be. Here a task is read
when an actor is free for it, and its file is written where it was worked out: the bytes are `local`'s.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from clip_base.runtime.errors import InputError
from clip_base.runtime.work import Failure, Result, Task, Work

SETTINGS = "REGIONCLIP_"  # begins the environment variables that actors have from the command
_CHANCES = 3  # of a task whose actors are lost: it may be what kills them
_PATIENCE = 60.0  # seconds without any actor until that is told


def run(
    start: Callable[[], Work[Task, Result]], tasks: Iterable[Task], workers: int, gpus: int
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, result) of all tasks; see `clip_base.runtime.workers.run`."""
    try:
        import ray  # noqa: PLC0415 (optional)
    except ImportError:
        raise InputError("executor=ray needs Ray; install it with `pip install 'regionclip[ray]'`") from None
    connected = ray.is_initialized()
    if not connected:
        ray.init(log_to_driver=False)
    try:
        yield from _Actors(ray, start, workers, gpus).results(iter(tasks))
    finally:
        if not connected:
            ray.shutdown()


class _Actor:
    """A worker of a Ray cluster.

    Args:
        start: makes the function that does the work.
        settings: environment variables.
        folder: the command's, from which it names files.
    """

    def __init__(self, start: Callable[[], Work[Any, Any]], settings: Mapping[str, str], folder: str) -> None:
        os.environ.update(settings)
        self.start, self.folder = start, folder
        self.work: Work[Any, Any] | None = None

    def ready(self) -> None:
        """Returns once the actor has its core or GPU."""

    def do(self, task: object) -> object:
        """Returns the task's result, or a Failure."""
        try:
            if self.work is None:
                os.chdir(self.folder)
                self.work = self.start()
            return self.work(task, lambda steps, note: None)
        except Exception as error:
            return Failure.of(error)


class _Actors:
    """Actors that share tasks; what a lost one had begun, others do.

    Args:
        ray: the package.
        start: see `clip_base.runtime.workers.run`, as are the rest.
    """

    def __init__(self, ray: ModuleType, start: Callable[[], Work[Any, Any]], workers: int, gpus: int) -> None:
        self.ray, self.start = ray, start
        resources = ray.cluster_resources()
        on_gpu = bool(gpus and resources.get("GPU"))
        most = max(int(resources.get("GPU" if on_gpu else "CPU", 1)), 1)
        self.most = min(workers or most, most)
        self.make = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0)(_Actor)
        # The cluster's processes were not started by this one and do not inherit what it was told.
        self.settings = {name: text for name, text in os.environ.items() if name.startswith(SETTINGS)}
        self.actors: list[Any] = []
        self.idle: list[Any] = []
        # What is to come -> the actor, and the task with how often it was lost; None: the actor gets ready.
        self.busy: dict[Any, tuple[Any, tuple[Any, int] | None]] = {}
        self.first: deque[tuple[Any, int]] = deque()  # tasks that were read and that no actor has

    def results(self, tasks: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        """Yields (task, result) of all tasks; reads one when an actor is free for it."""
        try:
            for task in itertools.islice(tasks, self.most):
                self.first.append((task, 0))
                self._hire()
            while self.first or any(given is not None for _, given in self.busy.values()):
                ended = self._next()
                actor, given = self.busy.pop(ended)
                try:
                    result = self.ray.get(ended)
                except self.ray.exceptions.RayError as error:
                    self._lost(actor, given, error)
                else:
                    if isinstance(result, Failure):
                        raise result.again()
                    self.idle.append(actor)
                    if given is not None:
                        yield given[0], result
                self._give(tasks)
        finally:
            for actor in self.actors:
                self.ray.kill(actor)

    def _next(self) -> Any:
        """Returns what has come first."""
        alone = all(given is None for _, given in self.busy.values())
        ended, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=_PATIENCE if alone else None)
        if not ended:
            print("waiting for a free core or GPU of the Ray cluster", file=sys.stderr, flush=True)
            ended, _ = self.ray.wait(list(self.busy), num_returns=1)
        return ended[0]

    def _hire(self) -> None:
        actor = self.make.remote(self.start, self.settings, os.getcwd())
        self.actors.append(actor)
        self.busy[actor.ready.remote()] = actor, None

    def _give(self, tasks: Iterator[Any]) -> None:
        """Gives tasks to actors that have none."""
        while self.idle:
            if not self.first:
                self.first.extend((task, 0) for task in itertools.islice(tasks, 1))
            if not self.first:
                return
            actor, given = self.idle.pop(), self.first.popleft()
            self.busy[actor.do.remote(given[0])] = actor, given

    def _lost(self, actor: Any, given: tuple[Any, int] | None, error: Exception) -> None:
        """Puts what a lost actor had begun first again; a task that is lost too often is an error."""
        self.actors.remove(actor)
        self.ray.kill(actor)  # it may live where only its result was lost
        self._hire()  # waits for a core as long as there is none, while others go on
        if given is None:
            return
        task, times = given
        if times + 1 == _CHANCES:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"a worker of the Ray cluster was lost, as were {times} before with the same task: {reason}"
            ) from error
        self.first.appendleft((task, times + 1))
