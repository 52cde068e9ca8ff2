from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from clip_base.jobs.config import option
from clip_base.jobs.run import RunFolder, files_of
from clip_base.runtime.errors import InputError


@dataclass
class Inner:
    lr: float = option(0.1, "rate")
    workers: int = option(0, "processes", runtime_only=True)


@dataclass
class Job:
    out: str = option("x", "folder", runtime_only=True)
    size: int = option(3, "size")
    inner: Inner = option(Inner(), "nested")


def test_a_finished_run_gives_its_metrics_to_the_same_command(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "out"), Job(), "job")
    assert run.finished() is None
    run.finish({"loss": 0.5})
    assert RunFolder(str(tmp_path / "out"), Job(), "job").finished() == {"loss": 0.5}


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    RunFolder(str(tmp_path), Job(), "job").log({"step": 1})
    with pytest.raises(
        InputError, match=r"inner\.lr=0\.1 there, 0\.2 here; size=3 there, 4 here.*another out="
    ):
        RunFolder(str(tmp_path), Job(size=4, inner=Inner(lr=0.2)), "job")
    assert "size: 3" in (tmp_path / "config.yaml").read_text()


def test_a_run_from_before_an_option_existed_resumes_with_its_default(tmp_path: Path) -> None:
    RunFolder(str(tmp_path), Job(), "job").log({"step": 1})
    config = tmp_path / "config.yaml"
    config.write_text("".join(line for line in config.open() if "size" not in line and "lr" not in line))
    with pytest.raises(InputError, match=r"size=3 there, 4 here"):
        RunFolder(str(tmp_path), Job(size=4), "job")
    RunFolder(str(tmp_path), Job(), "job")
    assert "size: 3" in config.read_text()


def test_free_options_may_change(tmp_path: Path) -> None:
    RunFolder(str(tmp_path), Job(), "job")
    RunFolder(str(tmp_path), replace(Job(), out="elsewhere", inner=Inner(workers=2)), "job")
    assert "workers: 2" in (tmp_path / "config.yaml").read_text()


def test_a_call_that_failed_at_once_holds_no_run(tmp_path: Path) -> None:
    RunFolder(str(tmp_path), Job(), "job")
    assert RunFolder(str(tmp_path), Job(size=4), "job").finished() is None
    assert "size: 4" in (tmp_path / "config.yaml").read_text()


def test_another_jobs_folder_is_refused(tmp_path: Path) -> None:
    RunFolder(str(tmp_path), Job(), "job").log({"step": 1})
    with pytest.raises(InputError, match="holds a run of 'job', not of 'task'"):
        RunFolder(str(tmp_path), Job(), "task")


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and has no run"):
        RunFolder(str(tmp_path), Job(), "job")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_kill_left_before_the_first_line_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.tmp").write_text("half")
    assert RunFolder(str(tmp_path), Job(), "job").finished() is None


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        RunFolder(str(path), Job(), "job")


def test_rewinding_the_log_drops_later_steps_and_a_line_cut_off(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), Job(), "job")
    run.rewind_log(5)
    for step in (1, 2, 3):
        run.log({"step": step})
    with run.log_path.open("a") as file:
        file.write('{"step": 4, "lo')
    run.rewind_log(2)
    run.log({"step": 3, "again": True})
    lines = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize("name", [".lock", ".lock.json", "..lock.json.7.tmp", ".lock-1-of-2"])
def test_files_of_a_lock_are_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert RunFolder(str(tmp_path), Job(), "job").finished() is None


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of weights."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"abcd")
    return folder


def test_an_input_of_another_content_is_refused_by_name(tmp_path: Path, weights: Path) -> None:
    out, inputs = tmp_path / "out", {"weights": weights, "captions": weights / "model.bin", "language": "en"}
    RunFolder(str(out), Job(), "job", inputs).log({"step": 1})
    assert RunFolder(str(out), Job(), "job", inputs).finished() is None
    (weights / "model.bin").write_bytes(b"abcx")  # of the same size
    with pytest.raises(InputError) as caught:
        RunFolder(str(out), Job(inner=Inner(workers=2)), "job", inputs | {"language": "de"})
    told = f"weights ({weights}) and captions ({weights / 'model.bin'}) and language changed since the run in"
    assert told in str(caught.value)
    assert "another out=" in str(caught.value)
    assert "workers: 0" in (out / "config.yaml").read_text()


def test_after_a_call_that_failed_at_once_inputs_may_change(tmp_path: Path, weights: Path) -> None:
    RunFolder(str(tmp_path / "out"), Job(), "job", {"weights": weights})
    (weights / "model.bin").write_bytes(b"corrected")
    RunFolder(str(tmp_path / "out"), Job(), "job", {"weights": weights}).log({"step": 1})
    RunFolder(str(tmp_path / "out"), Job(), "job", {"weights": weights})


def test_a_run_that_does_not_say_what_it_read_is_refused(tmp_path: Path, weights: Path) -> None:
    RunFolder(str(tmp_path / "out"), Job(), "job").log({"step": 1})
    with pytest.raises(InputError, match="does not say which files its run read"):
        RunFolder(str(tmp_path / "out"), Job(), "job", {"weights": weights})


def test_files_are_found_wherever_options_may_name_them(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("base.txt", "novel.txt", "names.txt", "w.pt")]
    for path in paths:
        path.write_text("cat\n")
    base, novel, names, weights = map(str, paths)

    @dataclass
    class Options:
        split: str = f"{base},{novel}"
        names: list[str] = field(default_factory=lambda: ["dog", names])
        proposer: dict[str, object] = field(default_factory=lambda: {"weights": weights, "max": 3})
        inner: Inner = field(default_factory=Inner)
        empty: str = ""
        text: str = "x" * 5000

    found = files_of(Options(), "split", "names", "proposer", "inner", "empty", "text")
    assert found == {
        "split[0]": paths[0],
        "split[1]": paths[1],
        "names.1": paths[2],
        "proposer.weights": paths[3],
    }
