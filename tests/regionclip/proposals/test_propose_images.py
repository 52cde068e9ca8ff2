"""Proposals of images without annotations: of folders, captions and tars; mining finds them again."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]
GRID = ["proposer.name=grid", "proposer.sizes=[0.5,1.0]", "resize.short=[64]", "resize.long=64"]


@pytest.fixture
def mining(mining_options: list[str]) -> list[str]:
    """What mining needs, but for images, proposer and `out`."""
    return [one for one in mining_options if not one.startswith(("images=", "captions=", "proposer."))]


def proposed(regionclip: Command, out: Path, *options: object) -> list[dict[str, Any]]:
    code, told = regionclip("propose", *options, *GRID, f"out={out}")
    assert code == 0, told
    found: list[dict[str, Any]] = json.loads((out / "proposals.json").read_text())
    return found


def from_file(file: Path) -> list[str]:
    return ["proposer.name=precomputed", f"proposer.file={file}", "proposer.limit=1000"]


def boxes(folder: Path) -> list[Any]:
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [(row["file_name"], [round(side, 1) for side in row["box"]], row["concept"]) for row in rows]


def renamed(tar: Path, target: Path, new: Callable[[str], str]) -> None:
    """Copies a tar with other names of its members."""
    with tarfile.open(tar) as old, tarfile.open(target, "w") as written:
        for member in old.getmembers():
            content = old.extractfile(member)
            member.name = new(member.name)
            written.addfile(member, content)


def test_a_folder_a_pattern_and_captions_give_the_boxes_of_annotations(
    world: Path, regionclip: Command, tmp_path: Path
) -> None:
    images = f"images={world / 'images'}"
    known = proposed(regionclip, tmp_path / "a", f"annotations={world / 'instances_train.json'}", images)
    captioned = proposed(regionclip, tmp_path / "c", f"captions={world / 'captions_train.json'}", images)
    plain = [{key: entry[key] for key in known[0]} for entry in captioned]
    assert plain == known
    assert "file_name" not in known[0]
    content = json.loads((world / "captions_train.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    assert all(entry["file_name"] == names[entry["image_id"]] for entry in captioned)
    assert {(entry["height"], entry["width"]) for entry in captioned} == {(64, 64)}
    everything = proposed(regionclip, tmp_path / "f", images)
    pattern = proposed(regionclip, tmp_path / "p", f"images={world / 'images'}/**")
    assert everything == pattern
    by_name = {(entry["file_name"], *entry["bbox"]) for entry in everything}
    assert {(entry["file_name"], *entry["bbox"]) for entry in captioned} < by_name
    metrics = json.loads((tmp_path / "f" / "metrics.json").read_text())
    assert metrics["images"] == 16
    assert not any(name.startswith("recall") for name in metrics)
    assert not list((tmp_path / "c").glob(".images*"))


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_mining_tars_finds_what_was_proposed_for_them(
    kind: str, tars: Path, mining: list[str], regionclip: Command, tmp_path: Path
) -> None:
    images = f"images={tars}/train-{{0000..0002}}.tar"
    code, told = regionclip("propose", images, *GRID, f"format={kind}", f"out={tmp_path / 'p'}")
    assert code == 0, told
    assert regionclip("mine", images, *mining, *GRID[:2], f"out={tmp_path / 'own'}")[0] == 0
    own = boxes(tmp_path / "own")
    given = from_file(tmp_path / "p" / f"proposals.{kind}")
    code, told = regionclip("mine", images, *mining, *given, f"out={tmp_path / 'given'}")
    assert code == 0, told
    assert len(own) > 50
    assert sorted(name for name, *_ in boxes(tmp_path / "given")) == sorted(name for name, *_ in own)
    # Shards that were named otherwise since are found by the keys of their records.
    (tmp_path / "moved").mkdir()
    for tar in tars.glob("train-*.tar"):
        shutil.copy(tar, tmp_path / "moved" / f"new-{tar.name}")
    moved = f"images={tmp_path / 'moved'}/new-*.tar"
    assert regionclip("mine", moved, *mining, *given, f"out={tmp_path / 'again'}")[0] == 0
    assert boxes(tmp_path / "again") == boxes(tmp_path / "given")


def test_a_key_of_two_images_is_refused(
    tars: Path, mining: list[str], regionclip: Command, tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(tars / "train-0000.tar", tmp_path / folder / "x.tar")
    both = f"images={tmp_path}/a/x.tar::{tmp_path}/b/x.tar"
    found = proposed(regionclip, tmp_path / "p", both)
    assert {entry["file_name"].split("/")[0] for entry in found} == {"a", "b"}
    given = from_file(tmp_path / "p" / "proposals.json")
    assert regionclip("mine", both, *mining, *given, f"out={tmp_path / 'good'}")[0] == 0
    shutil.copy(tars / "train-0000.tar", tmp_path / "other.tar")
    code, told = regionclip(
        "mine", f"images={tmp_path}/other.tar", *mining, *given, f"out={tmp_path / 'bad'}"
    )
    assert code == 2, told
    assert "which several images of proposals file" in told
    assert "a/x.tar/" in told
    assert "b/x.tar/" in told


def test_a_key_of_an_image_of_another_size_is_refused(
    tars: Path, mining: list[str], regionclip: Command, tmp_path: Path
) -> None:
    found = proposed(regionclip, tmp_path / "p", f"images={tars}/train-0000.tar")
    file = tmp_path / "other.json"
    file.write_text(json.dumps([{**one, "file_name": one["file_name"][6:], "width": 640} for one in found]))
    renamed(tars / "train-0000.tar", tmp_path / "x.tar", lambda name: name)
    code, told = regionclip(
        "mine", f"images={tmp_path}/x.tar", *mining, *from_file(file), f"out={tmp_path / 'out'}"
    )
    assert code == 2, told
    assert "it is another image" in told


def test_numbers_alone_say_nothing_of_the_images_in_tars(
    world: Path, tars: Path, mining: list[str], regionclip: Command, tmp_path: Path
) -> None:
    annotated = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    proposed(regionclip, tmp_path / "p", *annotated)
    given = from_file(tmp_path / "p" / "proposals.json")
    code, told = regionclip("mine", f"images={tars}/train-*.tar", *mining, *given, f"out={tmp_path / 'out'}")
    assert code == 2, told
    assert "has neither file_name nor key" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give images="),
        (["annotations=a.json"], "need images="),
        (["annotations=a.json", "images=b", "captions=c.json"], "not both"),
        (["images=b", "split=coco"], "needs annotations="),
    ],
)
def test_contradicting_options_are_refused(
    options: list[str], told: str, regionclip: Command, tmp_path: Path
) -> None:
    code, found = regionclip("propose", *options, *GRID, f"out={tmp_path / 'out'}")
    assert code == 2
    assert told in found
    assert not (tmp_path / "out").exists()
