"""A Ray cluster of several nodes does each task once, also when a node is lost in the middle."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.runtime.errors import InputError
from clip_base.runtime.workers import Report, run

pytestmark = pytest.mark.slow


def squares(folder: str) -> Callable[[int, Report], tuple[int, str]]:
    """Work that notes in the folder where it is done, before it is done."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def work(task: int, report: Report) -> tuple[int, str]:
        (Path(folder) / f"{task}-{node}-{time.time_ns()}").touch()
        if task == 13:
            raise InputError("13 is no number of ours")
        if task == 16:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        return task**2, os.environ.get("OMP_NUM_THREADS", "")

    return work


def begun(folder: Path) -> dict[int, list[str]]:
    """Returns the nodes on which each task was begun, in order."""
    found: dict[int, list[tuple[int, str]]] = {}
    for path in folder.iterdir():
        task, node, when = path.name.split("-")
        found.setdefault(int(task), []).append((int(when), node))
    return {task: [node for _, node in sorted(nodes)] for task, nodes in found.items()}


def test_tasks_are_shared_and_failures_told(cluster: Any, tmp_path: Path) -> None:
    import ray

    start = functools.partial(squares, str(tmp_path))
    assert sorted(run("ray", start, range(9), 3)) == [(n, (n * n, "1")) for n in range(9)]
    nodes = begun(tmp_path)
    assert len({node for (node,) in nodes.values()}) == 3
    with pytest.raises(InputError, match="13 is no number of ours"):
        list(run("ray", start, [13], 1))
    with pytest.raises(RuntimeError, match="a worker of the Ray cluster was lost, as were 2 before"):
        list(run("ray", start, [1, 16], 2))
    assert len(begun(tmp_path)[16]) == 3
    assert ray.is_initialized()  # a cluster that was there stays
    read: list[int] = []
    tasks = (read.append(n) or n for n in range(1000))
    results = run("ray", start, tasks, 3)
    next(results)
    assert len(read) <= 4  # tasks and results do not pile up in this process
    results.close()  # type: ignore[attr-defined]


def test_what_a_lost_node_had_begun_is_done_by_others_once(cluster: Any, tmp_path: Path) -> None:
    start = functools.partial(squares, str(tmp_path))
    first = cluster.head_node.node_id
    lost: list[str] = []

    def lose_a_node() -> None:
        while not lost:
            elsewhere = {node for nodes in begun(tmp_path).values() for node in nodes if node != first}
            for node in cluster.list_all_nodes():
                if node.node_id in elsewhere and not lost:
                    lost.append(node.node_id)
                    cluster.remove_node(node, allow_graceful=False)
            time.sleep(0.02)

    thread = threading.Thread(target=lose_a_node, daemon=True)
    thread.start()
    results = list(run("ray", start, range(12), 3))
    thread.join(60)
    assert sorted(results) == [(n, (n * n, "1")) for n in range(12)]  # none is missing, none is there twice
    nodes = begun(tmp_path)
    repeated = {task for task, places in nodes.items() if len(places) > 1}
    assert repeated
    assert all(nodes[task][0] == lost[0] for task in repeated)
    assert all(places[-1] != lost[0] for task, places in nodes.items() if task in repeated)
