from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clip_base.runtime.errors import InputError
from clip_base.storage import files


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_json_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"a": ["ü", 1.5]})
    assert files.read_json(path) == {"a": ["ü", 1.5]}
    assert only(path.parent) == ["a.json"]


def test_a_missing_file_names_the_last_folder_that_exists(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"captions .*no/such/a.json does not exist \\({tmp_path} is the last"
    ):
        files.existing(tmp_path / "no" / "such" / "a.json", "captions")


@pytest.mark.parametrize(
    ("content", "reason"), [("", "is empty"), (" \n", "is empty"), ('{"a": [1,', "line 1, column")]
)
def test_json_that_cannot_be_used_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError, match=reason):
        files.read_json(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def half() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("stopped in the middle")

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == "old"
    assert only(tmp_path) == ["a.txt"]


def test_a_disk_that_fills_up_while_flushing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_text(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert only(tmp_path) == ["a.txt"]


def test_a_really_full_disk_leaves_the_old_file(tiny_disk: Path) -> None:
    path = tiny_disk / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_text(path, "x" * 1_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert only(tiny_disk) == ["a.txt"]


def test_a_librarys_error_on_a_disk_with_room_stays_what_it_is(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="something else"),
        files.naming_full_disk(tmp_path / "a", RuntimeError),
    ):
        raise RuntimeError("something else")
    with pytest.raises(OSError, match="No space left"), files.naming_full_disk(tmp_path / "a", RuntimeError):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with files.replacing(tmp_path / "weights.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)  # which makes files that only their owner may read
    files.write_text(tmp_path / "text", "hello")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
