"""Outputs at addresses: what is there is whole, any machine goes on with it, and one process writes."""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs import cli, remote_out
from clip_base.jobs.remote_out import Mirror
from clip_base.runtime.errors import InputError, JobError
from clip_base.storage import remote, remote_cache
from clip_base.storage.remote import filesystem

Elsewhere = Callable[[], None]
SCENES = ["scenes", "images=4", "size=64", "workers=1"]


@pytest.fixture
def place(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """An address where nothing is; the cache is empty."""
    monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote_out, "PATIENCE", 0.2)
    remote_cache.fetch.cache_clear()
    return f"{store}/out-{uuid.uuid4().hex[:8]}/run"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Elsewhere:
    """Goes to another machine: with an empty cache."""

    def go() -> None:
        monkeypatch.setenv("CLIP_BASE_CACHE", str(tmp_path / uuid.uuid4().hex))
        remote_cache.fetch.cache_clear()

    return go


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are copied to an address, in order."""
    names: list[str] = []
    put = Mirror._put
    monkeypatch.setattr(Mirror, "_put", lambda self, name: (names.append(name), put(self, name)))
    return names


def files_at(address: str) -> dict[str, bytes]:
    """What is at an address and beside it, but the list and the lock."""
    files, path = filesystem(address)
    files.invalidate_cache()
    base = path.rpartition("/")[0] + "/"
    return {
        name.removeprefix(base): files.cat_file(name)
        for name in files.find(base)
        if not name.endswith((".files.json", ".lock.json"))
    }


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder.parent).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".lock" not in path.name
    }


def test_a_job_leaves_at_an_address_what_it_leaves_in_a_folder(
    place: str,
    tmp_path: Path,
    elsewhere: Elsewhere,
    copied: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*SCENES, f"out={place}"]) == 0
    assert f"copied to {place}" in capsys.readouterr().out
    assert cli.main([*SCENES, f"out={tmp_path / 'run'}"]) == 0
    found, wanted = files_at(place), files_in(tmp_path / "run")
    assert found.keys() == wanted.keys()
    assert len(found) > 8
    assert {name for name in found if found[name] != wanted[name]} <= {"run/config.yaml"}  # which names out
    elsewhere()
    copied.clear()
    assert cli.main([*SCENES, f"out={place}"]) == 0
    assert set(copied) <= {"run/config.yaml"}  # it knows that the run is complete
    assert cli.main([*SCENES, "images=5", f"out={place}"]) == 2


def test_a_file_and_what_stands_beside_it_are_written_and_read(
    place: str, tmp_path: Path, elsewhere: Elsewhere, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("spacy")
    texts = tmp_path / "captions.txt"
    texts.write_text("a red dog\na dog and a cat\n")
    out = f"{place}.jsonl"
    assert cli.main(["region-concepts", f"captions={texts}", "min_count=1", f"out={out}"]) == 0
    assert {"run.jsonl", "run.jsonl.meta.json", "run.jsonl.phrases.db"} <= set(files_at(place))
    elsewhere()
    capsys.readouterr()
    assert cli.main(["region-concepts", f"captions={texts}", "min_count=1", f"out={out}"]) == 0
    assert "already exists and was made with the same options" in capsys.readouterr().out


def test_what_a_kill_leaves_is_what_was_listed_last(place: str, elsewhere: Elsewhere) -> None:
    first = Mirror(place)
    context = first.kept()
    context.__enter__()
    (first.local / "deep").mkdir(parents=True)
    (first.local / "deep" / "a.txt").write_text("a")
    first.push()
    (first.local / "b.txt").write_text("b")
    first._put("run/b.txt")  # and is killed before the list is written
    filesystem(place)[0].rm_file(first._lock)
    elsewhere()
    second = Mirror(place)
    with second.kept():
        assert {path.name for path in second.local.rglob("*") if path.is_file()} == {"a.txt"}
        (second.local / "deep" / "a.txt").unlink()
        (second.local / "c.txt").write_text("c")
    elsewhere()
    third = Mirror(place)
    with third.kept():
        assert {path.name for path in third.local.rglob("*") if path.is_file()} == {"c.txt"}


def test_manifests_and_metrics_come_last(place: str, copied: list[str]) -> None:
    mirror = Mirror(place)
    with mirror.kept():
        mirror.local.mkdir(parents=True)
        for name in ("manifest.json", "a.parquet", "metrics.json", "z.parquet", ".a.parquet.1.tmp"):
            (mirror.local / name).write_text(name)
    assert copied == ["run/a.parquet", "run/z.parquet", "run/manifest.json", "run/metrics.json"]


def test_while_a_job_works_what_it_has_finished_is_copied(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_out, "INTERVAL", 0.02)
    seen = threading.Event()
    push = Mirror.push

    def pushed(self: Mirror, whole: bool = True) -> None:
        push(self, whole)
        if not whole and self._sent:
            seen.set()

    monkeypatch.setattr(Mirror, "push", pushed)
    mirror = Mirror(place)
    with mirror.kept():
        mirror.local.mkdir(parents=True)
        (mirror.local / "a.txt").write_text("a")
        (mirror.local / "half.db").write_text("half")
        assert seen.wait(60)
        assert set(files_at(place)) == {"run/a.txt"}
    assert set(files_at(place)) == {"run/a.txt", "run/half.db"}


def write_at(place: str, then: Callable[[Mirror], object]) -> None:
    mirror = Mirror(place)
    with mirror.kept():
        mirror.local.mkdir(parents=True)
        (mirror.local / "a.txt").write_text("a")
        then(mirror)


def lock_of(place: str, **changes: Any) -> None:
    held = {"owner": "x", "pid": os.getpid(), "host": "elsewhere", "machine": 1, "beat": 0} | changes
    files, path = filesystem(place)
    files.pipe_file(f"{path.rpartition('/')[0]}/.run.lock.json", json.dumps(held).encode())


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"host": socket.gethostname(), "machine": uuid.getnode()}
    lock_of(place, **here)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
        Mirror(place).kept().__enter__()
    lock_of(place, **here, pid=2**22 - 1)  # such a process does not run
    with Mirror(place).kept():
        pass
    lock_of(place)  # of another machine that gives no sign of life
    with Mirror(place).kept():
        pass
    assert "is process" in capsys.readouterr().err
    files, path = filesystem(place)
    assert not files.exists(f"{path.rpartition('/')[0]}/.run.lock.json")


def test_a_process_on_another_machine_that_lives_is_left_alone(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_of(place)
    beats = iter(range(1, 100))
    monkeypatch.setattr(remote_out.time, "sleep", lambda _: lock_of(place, beat=next(beats)))
    monkeypatch.setattr(remote_out, "PATIENCE", 60.0)
    with pytest.raises(InputError, match="is in use by process"):
        Mirror(place).kept().__enter__()


def test_one_that_was_taken_for_dead_writes_no_more(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken_over(mirror: Mirror) -> None:
        lock_of(place)
        mirror._beat()

    with pytest.raises(JobError, match=r"another process has taken .* over"):
        write_at(place, taken_over)
    assert files_at(place) == {}


def test_without_the_store_the_work_is_kept_here(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    with pytest.raises(JobError, match=r"no route to host; what was done is in .*run: the same command"):
        write_at(place, lambda mirror: monkeypatch.setattr(mirror._files, "put_file", refuse))
    monkeypatch.undo()


@pytest.mark.parametrize("address", ["https://host/x", "hf://datasets/owner/name/x"])
def test_where_nothing_can_be_written_is_told(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SCENES, f"out={address}"]) == 2
    assert "cannot be written; give a path, or an address at s3:// or gs://" in capsys.readouterr().err
