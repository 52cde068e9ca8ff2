"""Fixtures that all tests share."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clip_base.storage.remote import filesystem

# Tests start processes beside each other; OpenMP threads that spin would slow them all down manyfold. Torch
# reads this when it is imported, and what the tests start inherits it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nor shall it depend on the machine's speed what a test reads on stderr.
os.environ["REGIONCLIP_QUIET"] = "1"

# A shell starts what shall run in the background with Ctrl-C ignored, and that is inherited; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
PATIENCE = 1800.0  # seconds until a test gives up on a process: a guard against hanging, no measure of speed

Launch = Callable[[list[list[str]]], list[subprocess.CompletedProcess[str]]]
AfterImport = Callable[[str, str], dict[str, str]]
JOBS = """
import json, sys
from clip_base.jobs import cli

for command in json.loads(sys.argv[1]):
    code = cli.main(command)
    if code:
        sys.exit(code)
"""

# Processes that the tests start import nothing of the tests; this is loaded by Python as it starts.
SITE = """
import importlib.abc, importlib.machinery, sys

class After(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def both(module):
            run(module)
            exec(CODE, {"module": module})
        spec.loader.exec_module = both
        return spec

sys.meta_path.insert(0, After())
"""


def _launch(commands: list[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOBS, json.dumps(commands)],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = []
    for child in started:
        output, errors = child.communicate(timeout=PATIENCE)
        ended.append(subprocess.CompletedProcess(child.args, child.returncode, output, errors))
    return ended


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the options that `--help` reads away from the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _nothing_from_drive() -> Iterator[None]:
    """Makes gdown look absent: tests download nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gdown", None)
        yield


@pytest.fixture(autouse=True)
def _no_progress() -> Iterator[None]:
    """Keeps progress off stderr: on a slow machine there would be a line of it among what a test reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_base.runtime.progress.SECONDS_BETWEEN_LINES", math.inf)
        yield


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Runs commands, [job, option, …] each, one after another in two processes, as torchrun starts them."""
    return _launch


@pytest.fixture(scope="session")
def patience() -> float:
    """Seconds until a test gives up on a process that it started, however busy the machine is."""
    return PATIENCE


@pytest.fixture
def after_import(tmp_path: Path) -> AfterImport:
    """Makes an environment in which Python runs code once a module has been imported, in workers too.

    after_import("package.name", "module.function = …"): the code knows the module as `module`.
    """

    def make(name: str, code: str) -> dict[str, str]:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"NAME = {name!r}\nCODE = {code!r}\n{SITE}")
        return {"PYTHONPATH": str(folder)}

    return make


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """An object store on this machine that speaks S3; all processes that a test starts find it.

    Yields the address of a bucket.
    """
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        files, _ = filesystem("s3://bucket")
        files.mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster on this machine to which this process belongs: three nodes of one core each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        started.add_node(num_cpus=1)
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and captions; tests that use it are skipped where it is absent."""
    folder = Path(os.environ.get("REGIONCLIP_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real images here; set REGIONCLIP_TEST_DATA to their folder")
    return folder
