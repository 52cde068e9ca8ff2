"""Mining refuses to go on where inputs or options changed, and goes on where the disk was full."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.storage.files import write_json
from regionclip.mining import mine, shards
from regionclip.mining.shards import read_regions

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_options_in_the_same_folder_are_refused(
    mined: Path, mining_options: list[str], swapped: Swap, regionclip: Command
) -> None:
    code, told = regionclip("mine", *swapped(mining_options, context=1.5), f"out={mined}")
    assert code == 2
    assert "context=1.2 there, 1.5 here" in told
    assert "another out=" in told


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("key", ["weights", "captions", "concepts", "proposer.file"])
def test_a_file_that_changed_since_mining_began_is_refused(
    mining_options: list[str],
    swapped: Swap,
    tmp_path: Path,
    regionclip: Command,
    key: str,
    finished: bool,
) -> None:
    boxes = [{"image_id": 1, "bbox": [0, 0, 40, 40], "score": 0.9}]
    write_json(tmp_path / "boxes.json", boxes)
    options = [option for option in mining_options if not option.startswith("proposer.")]
    options += ["proposer.name=precomputed", f"proposer.file={tmp_path / 'boxes.json'}", "shard_images=12"]
    file = Path(next(option.partition("=")[2] for option in options if option.startswith(f"{key}=")))
    copy = tmp_path / f"copy{file.suffix}"
    shutil.copy(file, copy)
    command = ["mine", *swapped(options, **{key: copy}), f"out={tmp_path / 'mined'}"]
    assert regionclip(*command)[0] == 0
    if not finished:
        for name in ("manifest.json", "metrics.json", "shard-00000.parquet"):
            (tmp_path / "mined" / name).unlink()
    copy.write_bytes(copy.read_bytes() + b"\n")
    before = files_of(tmp_path / "mined")
    code, told = regionclip(*command)
    assert code == 2
    assert f"({copy}) changed since the run in {tmp_path / 'mined'} started" in told
    assert files_of(tmp_path / "mined") == before


def test_another_spacy_model_is_refused(
    mined: Path, mining_options: list[str], regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "model_name", lambda language: "en_other 1.0")
    code, told = regionclip("mine", *mining_options, f"out={mined}")
    assert code == 2
    assert "language_model changed since the run" in told


def test_a_call_that_failed_at_once_leaves_nothing_in_the_way(
    mining_options: list[str], swapped: Swap, world: Path, tmp_path: Path, regionclip: Command
) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text((world / "captions_train.json").read_text()[:-9])
    command = ["mine", *swapped(mining_options, captions=captions), f"out={tmp_path / 'mined'}"]
    assert regionclip(*command)[0] == 2
    shutil.copy(world / "captions_train.json", captions)
    assert regionclip(*command, "context=1.5")[0] == 0


def test_a_full_disk_stops_mining_and_the_same_command_goes_on(
    mined: Path,
    mining_options: list[str],
    tmp_path: Path,
    regionclip: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, command = shards.write_shard, ["mine", *mining_options, f"out={tmp_path / 'mined'}"]

    def full(path: Path, regions: Any, images: Any) -> int:
        if path.name == "shard-00001.parquet":
            raise OSError(28, "No space left on device", str(path))
        return write(path, regions, images)

    monkeypatch.setattr(shards, "write_shard", full)
    code, told = regionclip(*command)
    assert code == 1
    assert "the disk is full while writing" in told
    assert "shard-00001.parquet" in told
    monkeypatch.undo()
    assert regionclip(*command)[0] == 0
    assert list(read_regions(tmp_path / "mined")) == list(read_regions(mined))
