"""Webdataset tars are mined without unpacking: each is a unit of work, read from its start to its end."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clip_base.storage.tars import Member
from regionclip.mining import shard_writer
from regionclip.mining.miner import Miner
from regionclip.mining.shards import MinedRegion, read_images, read_manifest, read_regions

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]


@pytest.fixture
def options(tars: Path, mining_options: list[str], swapped: Swap) -> list[str]:
    """What mining the tars needs, but for `out`."""
    return swapped([one for one in mining_options if not one.startswith("captions=")],
                   images=f"{tars}/train-{{0000..0002}}.tar")  # fmt: skip


@pytest.fixture(scope="module")
def mined_tars(tars: Path, mining_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from clip_base.jobs.cli import main_regionclip

    kept = [one for one in mining_options if not one.startswith(("captions=", "images="))]
    out = tmp_path_factory.mktemp("mined") / "mined"
    call = ["mine", *kept, "source.name=webdataset", f"source.shards={tars}/train-*.tar", f"out={out}"]
    assert main_regionclip(call) == 0
    return out


def plain(region: MinedRegion) -> MinedRegion:
    """A region without what says where its image is."""
    return replace(region, image_id=0, key="", tar=None)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_tars_give_the_regions_of_the_folder(mined_tars: Path, mined: Path, tars: Path):
    found = list(read_regions(mined_tars))
    assert list(map(plain, found)) == list(map(plain, read_regions(mined)))
    manifest = read_manifest(mined_tars)
    assert manifest["shards"] == ["train-0000.parquet", "train-0001.parquet", "train-0002.parquet"]
    assert manifest["images"] == 12
    assert sum(manifest["samples"]) == len({region.image_id for region in found})
    assert found[0].key == "train/000000000001"
    assert found[0].tar == str(tars / "train-0000.tar")


def test_a_row_says_where_its_image_is(mined_tars: Path, world: Path):
    for image in read_images(mined_tars):
        assert image.tar is not None and image.offset is not None and image.size is not None  # noqa: PT018
        found = Member(Path(image.tar), image.offset, image.size).read_bytes()
        assert found == (world / "images" / image.file_name).read_bytes()
        assert len(image.captions) == 3


def test_a_stopped_run_resumes_in_the_shard_and_gives_the_same_bytes(
    options: list[str], mined_tars: Path, tmp_path: Path, regionclip: Command, monkeypatch: pytest.MonkeyPatch
):
    mine_batch, calls = Miner._mine_batch, list[int]()

    def stopping(self: Miner, batch: Any) -> Any:
        calls.append(len(batch.items))
        if len(calls) == 4:  # in the second tar, behind its first batch
            raise KeyboardInterrupt
        return mine_batch(self, batch)

    monkeypatch.setattr(Miner, "_mine_batch", stopping)
    monkeypatch.setattr(shard_writer, "SAVE_EVERY", 1e9)
    code, told = regionclip("mine", *options, "batch_size=3", f"out={tmp_path / 'out'}")
    assert code == 130
    assert "train-0001: 3 images are saved" in told
    monkeypatch.undo()
    assert regionclip("mine", *options, "batch_size=3", f"out={tmp_path / 'out'}")[0] == 0
    assert regionclip("mine", *options, "batch_size=3", f"out={tmp_path / 'whole'}")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*.parts"))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


@pytest.fixture
def odd(world: Path, tmp_path: Path) -> Path:
    """A tar of what crawls hold."""
    image = (world / "images/train/000000000001.jpg").read_bytes()
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a/deep/one.JPG", image)
        add(tar, "a/deep/one.json", json.dumps({"caption": "a red cup", "alt": ["a tree", 7]}).encode())
        add(tar, "broken.jpg", image[:50])
        add(tar, "broken.json", b'{"caption": "a cup"}')
        add(tar, "silent.jpg", image)
        add(tar, "cut.jpg", image)
        add(tar, "cut.json", b'{"caption": ')
        add(tar, "words.json", b'{"caption": "no image"}')
        add(tar, "half.png", image)
        add(tar, "half.json", b'{"caption": "a cup \\ud83d"}')
    return path


def test_what_cannot_be_mined_is_listed_with_the_reason(
    odd: Path, options: list[str], swapped: Swap, tmp_path: Path, regionclip: Command
):
    call = [one for one in options if not one.startswith("images=")]
    source = ["source.name=webdataset", f"source.shards={odd}", "source.captions=[json.caption,json.alt]"]
    out = tmp_path / "out"
    code, told = regionclip("mine", *call, *source, "matcher.name=caption", f"out={out}")
    assert code == 0, told
    rows = {image.key: image for image in read_images(out)}
    assert list(rows) == ["a/deep/one", "broken", "silent", "cut", "words", "half"]
    assert rows["a/deep/one"].captions == ("a red cup", "a tree")
    assert rows["half"].captions == ("a cup",)
    reasons = {key: row.reason or "" for key, row in rows.items()}
    assert "does not decode" in reasons["broken"]
    assert "cut.json is not valid JSON" in reasons["cut"]
    assert "has no image" in reasons["words"]
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    skipped = {entry["file_name"]: entry for entry in listed}
    assert skipped["broken.jpg"]["unreadable"]
    assert skipped["silent.jpg"]["reason"] == "it has no caption"
    assert "unreadable" not in skipped["silent.jpg"]


def test_a_gzipped_tar_is_mined_as_the_plain_one(
    tars: Path, options: list[str], swapped: Swap, mined_tars: Path, tmp_path: Path, regionclip: Command
):
    for path in sorted(tars.glob("train-*.tar")):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    given = swapped(options, images=f"{tmp_path}/train-*.tar.gz")
    assert regionclip("mine", *given, f"out={tmp_path / 'out'}")[0] == 0
    found = [replace(region, tar=None) for region in read_regions(tmp_path / "out")]
    assert found == [replace(region, tar=None) for region in read_regions(mined_tars)]


def test_a_truncated_tar_gives_what_it_holds_and_says_so(
    tars: Path, options: list[str], swapped: Swap, tmp_path: Path, regionclip: Command
):
    whole = (tars / "train-0000.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[: len(whole) // 2])
    given = swapped(options, images=f"{tmp_path}/short.tar")
    assert regionclip("mine", *given, f"out={tmp_path / 'out'}")[0] == 0
    rows = list(read_images(tmp_path / "out"))
    assert 1 < len(rows) < 6
    assert "was it truncated?" in (rows[-1].reason or "")
    assert rows[-1].unreadable
    (tmp_path / "short.tar").write_bytes(whole[: len(whole) // 2 + 700])
    assert regionclip("mine", *given, f"out={tmp_path / 'other'}")[0] == 0
    assert "is damaged" in (list(read_images(tmp_path / "other"))[-1].reason or "")


def test_tars_of_one_name_are_told_apart_and_one_given_twice_is_refused(
    tars: Path, options: list[str], swapped: Swap, tmp_path: Path, regionclip: Command
):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copy(tars / "train-0002.tar", tmp_path / folder / "0.tar")
    given = swapped(options, images=f"{tmp_path}/{{x,y}}/0.tar")
    assert regionclip("mine", *given, f"out={tmp_path / 'out'}")[0] == 0
    assert read_manifest(tmp_path / "out")["shards"] == ["x-0.parquet", "y-0.parquet"]
    given = swapped(options, images=f"{tmp_path}/x/0.tar::{tmp_path}/x/0.tar")
    code, told = regionclip("mine", *given, f"out={tmp_path / 'twice'}")
    assert code == 2
    assert "is given twice" in told
