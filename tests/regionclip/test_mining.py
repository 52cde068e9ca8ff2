"""Mining gives the same shards however often it is killed, and accounts for every image."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.cli import main_regionclip
from clip_base.files import read_json, write_json, write_text
from clip_base.weights.native import file_hash
from regionclip import mining
from regionclip.mining import row_of
from regionclip.phrases import Phrase
from regionclip.shards import read_manifest, read_regions
from regionclip.vocabulary import Vocabulary

Command = Callable[..., tuple[int, str]]

KILLED = """
import os, signal, sys
from regionclip import mining
from clip_base.cli import main_regionclip

write = mining.write_shard
def dying(path, regions):
    if path.name == "shard-00001.parquet":
        path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, regions)
mining.write_shard = dying
main_regionclip(sys.argv[1:])
"""


def manifest(folder: Path) -> dict[str, Any]:
    found = read_manifest(folder)
    found["config"].pop("out")
    return found


def swapped(options: list[str], **changes: object) -> list[str]:
    """Returns the options with some values replaced or added."""
    kept = [option for option in options if option.partition("=")[0] not in changes]
    return kept + [f"{key}={value}" for key, value in changes.items()]


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_killed_and_started_again_it_equals_an_undisturbed_run(
    mined: Path, mining_options: list[str], tmp_path: Path
) -> None:
    command = ["mine", *mining_options, f"out={tmp_path / 'mined'}"]
    dead = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, check=False)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    assert (tmp_path / "mined" / "shard-00000.parquet").exists()
    assert not (tmp_path / "mined" / "manifest.json").exists()
    assert main_regionclip(command) == 0
    assert list(read_regions(tmp_path / "mined")) == list(read_regions(mined))
    assert manifest(tmp_path / "mined") == manifest(mined)
    assert skipped(tmp_path / "mined") == skipped(mined)
    assert {path.name for path in (tmp_path / "mined").iterdir()} == {path.name for path in mined.iterdir()}


def test_a_finished_folder_is_left_alone(
    mined: Path, mining_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "Miner", None)  # a finished run needs none
    before = {path.name: path.stat().st_mtime_ns for path in mined.glob("*.parquet")}
    assert main_regionclip(["mine", *mining_options, f"out={mined}"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in mined.glob("*.parquet")} == before


def test_a_deleted_shard_is_mined_again(mined: Path, mining_options: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(mined, tmp_path / "mined")
    (folder / "shard-00001.parquet").unlink()
    assert main_regionclip(["mine", *mining_options, f"out={folder}"]) == 0
    assert list(read_regions(folder)) == list(read_regions(mined))


def test_regions_lie_in_their_images_and_name_their_concepts(mined: Path, world: Path) -> None:
    images = {entry["id"]: entry for entry in read_json(world / "captions_train.json")["images"]}
    captions: dict[int, list[str]] = {}
    for entry in read_json(world / "captions_train.json")["annotations"]:
        captions.setdefault(entry["image_id"], []).append(" ".join(entry["caption"].split()))
    vocabulary = Vocabulary.load(mined / "vocabulary.safetensors")
    rows = list(read_regions(mined))
    assert rows
    for row in rows:
        x1, y1, x2, y2 = row.box
        assert -1e-3 <= x1 < x2 <= row.width + 1e-3
        assert -1e-3 <= y1 < y2 <= row.height + 1e-3
        assert row.file_name == images[row.image_id]["file_name"]
        assert row.concept == vocabulary.names[row.concept_ids[0]]
        assert row.concept_probs == sorted(row.concept_probs, reverse=True)
        assert row.phrase is not None
        assert row.caption in captions[row.image_id]


def test_every_image_is_in_the_shards_or_in_the_list(mined: Path, world: Path) -> None:
    wanted = {entry["id"] for entry in read_json(world / "captions_train.json")["images"]}
    kept = {row.image_id for row in read_regions(mined)}
    left = {entry["image_id"] for entry in skipped(mined)}
    assert kept | left == wanted
    assert not kept & left
    assert read_manifest(mined)["images"] == len(wanted)
    assert read_manifest(mined)["skipped"] == len(left)


def test_the_manifest_names_its_inputs_by_hash(
    mined: Path, clip_file: Path, concepts_file: Path, world: Path
) -> None:
    found = read_manifest(mined)
    assert found["teacher"] == file_hash(clip_file)
    assert found["concepts"] == file_hash(concepts_file)
    assert found["captions"] == file_hash(world / "captions_train.json")
    assert found["vocabulary"] == Vocabulary.load(mined / "vocabulary.safetensors").fingerprint
    assert found["regions"] == len(list(read_regions(mined)))
    assert found["proposer"]["name"] == "grid"
    assert found["matcher"]["name"] == "caption"
    assert found["config"]["resize"] == {"short": [64], "long": 64, "flip": True}


def test_unusable_images_are_listed_with_their_reason(
    world: Path, mining_options: list[str], tmp_path: Path
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    content = read_json(world / "captions_train.json")
    ids = [entry["id"] for entry in content["images"]]
    names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    (images / names[ids[0]]).write_bytes(b"no picture")
    (images / names[ids[1]]).unlink()
    for entry in content["annotations"]:
        if entry["image_id"] == ids[2]:
            entry["caption"] = "nothing in particular"
    write_json(tmp_path / "captions.json", content)
    boxes = [{"image_id": key, "bbox": [0, 0, 40, 40], "score": 0.9} for key in ids if key != ids[3]]
    write_json(tmp_path / "boxes.json", boxes)
    options = [option for option in mining_options if not option.startswith("proposer.")]
    options = swapped(options, images=images, captions=tmp_path / "captions.json", out=tmp_path / "mined")
    proposer = ["proposer.name=precomputed", f"proposer.file={tmp_path / 'boxes.json'}"]
    assert main_regionclip(["mine", *options, *proposer]) == 0
    reasons = {entry["image_id"]: entry["reason"] for entry in skipped(tmp_path / "mined")}
    assert "does not decode" in reasons.pop(ids[0])
    assert "cannot be read: No such file" in reasons.pop(ids[1])
    assert reasons.pop(ids[2]) == "no caption names a concept of the pool"
    assert reasons.pop(ids[3]) == "no proposals"
    assert reasons == {}


@pytest.mark.parametrize("matcher", ["pool", "hybrid"])
@pytest.mark.parametrize("teacher", ["roi_align", "crop"])
def test_other_matchers_and_teachers_mine_too(
    mining_options: list[str], tmp_path: Path, matcher: str, teacher: str
) -> None:
    options = [option for option in mining_options if not option.startswith("matcher.")]
    command = ["mine", *options, f"matcher.name={matcher}", f"teacher={teacher}", f"out={tmp_path / 'mined'}"]
    if matcher == "hybrid":
        command.append("matcher.min_pool_probability=0.0")
    assert main_regionclip(command) == 0
    rows = list(read_regions(tmp_path / "mined"))
    assert any(row.phrase is None for row in rows)  # the pool also finds what no caption names


def test_other_options_in_the_same_folder_are_refused(
    mined: Path, mining_options: list[str], regionclip: Command
) -> None:
    code, told = regionclip("mine", *swapped(mining_options, context=1.5), f"out={mined}")
    assert code == 2
    assert "context=1.2 there, 1.5 here" in told
    assert "another out=" in told


def test_inputs_that_changed_since_the_kill_are_refused(
    mined: Path, mining_options: list[str], concepts_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    folder = tmp_path / "mined"
    pool = tmp_path / "concepts.jsonl"
    shutil.copy(concepts_file, pool)
    options = swapped(mining_options, concepts=pool)
    assert regionclip("mine", *options, f"out={folder}")[0] == 0
    for name in ("manifest.json", "metrics.json", "shard-00001.parquet"):
        (folder / name).unlink()
    write_text(pool, "".join(pool.read_text().splitlines(keepends=True)[:-2]))
    code, told = regionclip("mine", *options, f"out={folder}")
    assert code == 2
    assert f"{pool} changed since mining into {folder} began" in told


def test_a_full_disk_stops_mining_and_the_same_command_goes_on(
    mined: Path,
    mining_options: list[str],
    tmp_path: Path,
    regionclip: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, command = mining.write_shard, ["mine", *mining_options, f"out={tmp_path / 'mined'}"]

    def full(path: Path, regions: list[Any]) -> None:
        if path.name == "shard-00001.parquet":
            raise OSError(28, "No space left on device", str(path))
        write(path, regions)

    monkeypatch.setattr(mining, "write_shard", full)
    code, told = regionclip(*command)
    assert code == 1
    assert "the disk is full while writing" in told
    assert "shard-00001.parquet" in told
    monkeypatch.undo()
    assert regionclip(*command)[0] == 0
    assert list(read_regions(tmp_path / "mined")) == list(read_regions(mined))


def test_a_phrase_stands_for_its_head_first() -> None:
    phrase = Phrase("red umbrella", "umbrella", 2, 14)
    assert row_of(phrase, {"red umbrella": 0, "umbrella": 1}) == 1
    assert row_of(phrase, {"red umbrella": 0}) == 0
    assert row_of(phrase, {"cup": 0}) is None
