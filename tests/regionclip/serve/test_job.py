"""The options of `regionclip serve`, what it loads, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_base.jobs.config import resolve
from clip_base.runtime.errors import InputError
from regionclip.serve.job import ServeConfig, example_images, load_model
from regionclip.serve.server import listen

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Command:
    """The command line; its own fixture has the package's name."""
    return request.getfixturevalue("regionclip")  # type: ignore[no-any-return]


def test_a_clip_needs_a_proposer_and_a_detector_does_not(detector_file: Path, clip_file: Path) -> None:
    config = resolve(ServeConfig, None, [f"weights={detector_file}"])
    model = load_model(str(detector_file), config)
    assert model.title == f"{detector_file.parent.name}/model.safetensors"
    assert model.predictor.proposer is None
    with pytest.raises(InputError, match=r"has no proposal network; give proposer\.name=grid"):
        load_model(str(clip_file), config)
    config = resolve(ServeConfig, None, [f"weights={detector_file}", "proposer.name=grid"])
    assert load_model(str(clip_file), config).predictor.proposer is not None
    assert load_model(str(detector_file), config).predictor.proposer is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("score_threshold=1.5", r"score_threshold=1\.5 must be in \[0, 1\]"),
        ("port=70000", "port=70000 in 0…65535"),
        ("megapixels=0", "megapixels=0 must be above 0"),
        ("max_upload_mb=-1", "max_upload_mb=-1 must be above 0"),
    ],
)
def test_impossible_options_are_refused(change: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        resolve(ServeConfig, None, ["weights=x", change])


def test_examples_are_generated_or_a_folders(tmp_path: Path, world: Path) -> None:
    generated = example_images("", tmp_path)
    assert len(generated) == 6
    assert all(tmp_path in file.parents for file in generated)
    assert len(example_images(str(world / "images" / "val"), tmp_path)) == 4


def test_a_taken_port_is_told_before_anything_is_loaded(command: Command) -> None:
    listener, url = listen("127.0.0.1", 0)
    with listener:
        port = url.rpartition(":")[2]
        code, told = command("serve", "weights=nowhere.safetensors", f"port={port}")
    assert code == 2
    assert told == f"error: port {port} is taken; give another port=, or port=0 for a free one\n"


def test_bad_calls_are_told_in_one_line(command: Command, detector_file: Path) -> None:
    assert command("serve", "potr=1") == (2, "error: there is no option 'potr'; did you mean 'port'?\n")
    assert command("serve", "port=0") == (2, "error: missing: weights=…; see --help\n")
    code, told = command("serve", "weights=nowhere.safetensors", "port=0")
    assert (code, told.count("\n")) == (2, 1)
    assert "nowhere.safetensors" in told
    code, told = command("serve", f"weights={detector_file}", "port=0", "examples=nowhere", "lists=[]")
    assert (code, told.count("\n")) == (2, 1)
    assert "nowhere does not exist" in told


def test_without_gradio_it_says_what_to_install(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regionclip.serve.job.find_spec", lambda name: None)
    told = "error: the page needs Gradio: pip install 'regionclip[serve]'\n"
    assert command("serve", "weights=nowhere.safetensors", "port=0") == (2, told)


def test_the_job_and_its_help_do_not_import_gradio() -> None:
    code = "import sys, regionclip.serve.job; sys.exit('gradio' in sys.modules or 'starlette' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_two_lists_of_one_name_are_refused(command: Command, detector_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "coco.txt"
    other.write_text("dog\n")
    code, told = command("serve", f"weights={detector_file}", "port=0", f"lists=[coco,{other}]")
    assert code == 2
    assert "must have different names" in told


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert ServeConfig.host == "127.0.0.1"
    listener, url = listen(ServeConfig.host, 0)
    with listener:
        host, port = listener.getsockname()
        assert (host, url) == ("127.0.0.1", f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match="is no address"):
        listen("no such host", 0)
    with pytest.raises(InputError, match="cannot listen on 192"):
        listen("192.0.2.1", 0)
    listener, url = listen("0.0.0.0", 0)
    with listener:
        assert url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_though_a_page_is_open_and_leaves_no_upload_behind(
    ending: signal.Signals, detector_file: Path, tmp_path: Path, patience: float
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    code = "import sys; from clip_base.jobs.cli import main_regionclip; sys.exit(main_regionclip())"
    command = [sys.executable, "-c", code, "serve", f"weights={detector_file}", "port=0", "lists=[]"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        url = next(line for line in running.stdout if line.startswith("http")).split()[0]
        with urllib.request.urlopen(url) as response:
            assert "regionclip" in response.read().decode()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("regionclip-serve-")]
        with urllib.request.urlopen(f"{url}/gradio_api/heartbeat/open") as held:
            assert held.readline()
            running.send_signal(ending)
            _, told = running.communicate(timeout=patience)
    assert running.returncode == 0
    assert told.splitlines()[-1] == "stopped"
    assert "Traceback" not in told
    assert "ERROR" not in told
    assert not list(tmp_path.glob("regionclip-serve-*"))
