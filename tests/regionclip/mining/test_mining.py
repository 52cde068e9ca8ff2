"""Mining gives the same shards however often it is killed, and accounts for every image."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from clip_base.jobs.cli import main_regionclip
from clip_base.storage.files import read_json, write_json
from clip_base.storage.hashing import content_hash
from regionclip.concepts.phrase_cache import PhraseStore, phrases_file
from regionclip.concepts.phrases import Phrase
from regionclip.concepts.pool import Concept
from regionclip.concepts.spacy_models import model_name
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.mining import mine
from regionclip.mining.miner import row_of, rows_of
from regionclip.mining.shards import read_manifest, read_regions

Command = Callable[..., tuple[int, str]]
Swap = Callable[..., list[str]]
AfterImport = Callable[[str, str], dict[str, str]]

# Stands for regionclip.mining.shards.write_shard: dies with half a file written, once.
DYING = """
import os, signal

real = module.write_shard

def write(path, regions, images):
    rows = list(regions)
    mark = path.parent.with_name("died")
    if path.name == "shard-00001.parquet" and not mark.exists():
        mark.touch()
        path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, rows, images)

module.write_shard = write
"""
# The same for a run that cannot end: all shards but the first wait until there is a file "go on".
WAITING = """
import time

real = module.write_shard

def write(path, regions, images):
    while path.name != "shard-00000.parquet" and not path.parent.with_name("go on").exists():
        time.sleep(0.02)
    return real(path, regions, images)

module.write_shard = write
"""


def manifest(folder: Path) -> dict[str, Any]:
    found = read_manifest(folder)
    for key in ("out", "workers", "executor", "shard"):
        found["config"].pop(key)
    return found


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Returns what a run left, by name; without what names the folder and how the work was spread.

    The vocabulary's file holds a table in no certain order; the manifest has its fingerprint.
    """
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return found | dict.fromkeys(("config.yaml", "manifest.json", "vocabulary.safetensors"), b"")


def same_result(one: Path, other: Path) -> bool:
    return files(one) == files(other) and manifest(one) == manifest(other)


def command_line(*arguments: object, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """Starts `regionclip` in a process of its own, and session, after some lines of Python."""
    run = "from clip_base.jobs.cli import main_regionclip\nsys.exit(main_regionclip(sys.argv[1:]))"
    code = f"import sys\n{before}\n{run}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again_it_equals_an_undisturbed_run(
    mined: Path,
    mining_options: list[str],
    tmp_path: Path,
    after_import: AfterImport,
    patience: float,
    workers: int,
) -> None:
    out = tmp_path / "mined"
    command = ["mine", *mining_options, f"out={out}", f"workers={workers}"]
    dead = command_line(*command, **after_import("regionclip.mining.shards", DYING))
    _, told = dead.communicate(timeout=patience)
    if workers == 1:
        assert dead.returncode == -signal.SIGKILL, told
    else:
        assert dead.returncode == 1, told
        assert "a worker process ended by signal 9" in told
    assert list(out.glob(".shard-00001.*.tmp"))
    assert not (out / "shard-00001.parquet").exists()
    assert not (out / "manifest.json").exists()
    assert main_regionclip(command) == 0
    assert same_result(out, mined)


@pytest.mark.slow
def test_several_processes_leave_the_same_bytes(
    mined: Path, mining_options: list[str], tmp_path: Path
) -> None:
    assert main_regionclip(["mine", *mining_options, f"out={tmp_path / 'mined'}", "workers=2"]) == 0
    assert same_result(tmp_path / "mined", mined)


@pytest.mark.slow
def test_a_ray_cluster_leaves_the_same_bytes(
    mined: Path, mining_options: list[str], tmp_path: Path, patience: float
) -> None:
    pytest.importorskip("ray")
    command = ["mine", *mining_options, f"out={tmp_path / 'mined'}", "executor=ray", "workers=2"]
    done = command_line(*command, RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    _, told = done.communicate(timeout=patience)
    assert done.returncode == 0, told
    assert same_result(tmp_path / "mined", mined)


def test_without_ray_the_remedy_is_an_install(
    mining_options: list[str], tmp_path: Path, regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, told = regionclip("mine", *mining_options, f"out={tmp_path / 'mined'}", "executor=ray")
    assert code == 2
    assert "pip install 'regionclip[ray]'" in told


def test_shares_of_the_shards_mined_apart_are_one_result(
    mined: Path, mining_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["mine", *mining_options, f"out={tmp_path / 'mined'}"]
    assert main_regionclip([*command, "shard=2/2"]) == 0
    assert "share 2/2 is complete; 2 of 3 shards belong to other shares" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "mined").glob("*.parquet")} == {"shard-00001.parquet"}
    assert main_regionclip([*command, "shard=1/2"]) == 0
    assert same_result(tmp_path / "mined", mined)


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "1/0"])
def test_a_share_that_is_none_is_refused(
    share: str, mining_options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    code, told = regionclip("mine", *mining_options, f"out={tmp_path / 'mined'}", f"shard={share}")
    assert code == 2
    assert f"shard={share} must be K/N" in told


def test_phrases_kept_beside_the_pool_change_nothing_and_spare_the_parsing(
    world: Path, mining_options: list[str], swapped: Swap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = f"captions={world / 'captions_train.json'}"
    for name, kept in (("with", "true"), ("without", "false")):
        pool = tmp_path / f"{name}.jsonl"
        options = [captions, f"out={pool}", "min_count=1", "classes=[cup]", f"cache_phrases={kept}"]
        assert main_regionclip(["concepts", *options]) == 0
        assert phrases_file(pool).exists() == (kept == "true")
        if kept == "true":
            monkeypatch.setattr("regionclip.concepts.phrases.load_language", None)
        command = ["mine", *swapped(mining_options, concepts=pool), f"out={tmp_path / name}"]
        assert main_regionclip(command) == 0
        monkeypatch.undo()
    assert (tmp_path / "with.jsonl").read_bytes() == (tmp_path / "without.jsonl").read_bytes()
    assert list(read_regions(tmp_path / "with")) == list(read_regions(tmp_path / "without"))


def test_phrases_of_another_parser_are_said_to_be_parsed_anew(
    mining_options: list[str],
    swapped: Swap,
    concepts_file: Path,
    tmp_path: Path,
    regionclip: Command,
    mined: Path,
) -> None:
    pool = tmp_path / "concepts.jsonl"
    shutil.copy(concepts_file, pool)
    PhraseStore(phrases_file(pool), "another parser").close()
    code, told = regionclip("mine", *swapped(mining_options, concepts=pool), f"out={tmp_path / 'mined'}")
    assert code == 0
    assert "captions are parsed again" in told
    assert "with another spaCy model" in told
    assert list(read_regions(tmp_path / "mined")) == list(read_regions(mined))


def test_a_finished_folder_is_left_alone(
    mined: Path, mining_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "run", None)  # a finished run needs none
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
    assert found["teacher"] == content_hash(clip_file)
    assert found["concepts"] == content_hash(concepts_file)
    assert found["captions"] == content_hash(world / "captions_train.json")
    assert found["vocabulary"] == Vocabulary.load(mined / "vocabulary.safetensors").fingerprint
    assert found["regions"] == len(list(read_regions(mined)))
    assert found["language_model"] == model_name()
    assert found["proposer"]["name"] == "grid"
    assert found["matcher"]["name"] == "caption"
    assert (found["config"]["resize"]["short"], found["config"]["resize"]["long"]) == ([64], 64)


def test_unusable_images_are_listed_with_their_reason(
    world: Path, mining_options: list[str], swapped: Swap, tmp_path: Path
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    content = read_json(world / "captions_train.json")
    ids = [entry["id"] for entry in content["images"]]
    names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    (images / names[ids[0]]).write_bytes(b"no picture")
    (images / names[ids[1]]).unlink()
    content["images"][6]["height"] += 1
    for entry in content["annotations"]:
        if entry["image_id"] == ids[2]:
            entry["caption"] = "nothing in particular"
        if entry["image_id"] == ids[4]:
            entry["caption"] = "a velociraptor"
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != ids[5]]
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
    assert reasons.pop(ids[2]) == "no caption holds a noun phrase"
    assert reasons.pop(ids[4]) == "no caption names a concept of the pool"
    assert reasons.pop(ids[5]) == "it has no caption"
    assert reasons.pop(ids[3]) == "no proposals"
    assert "has it been resized" in reasons.pop(ids[6])
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


def test_a_phrase_stands_for_its_head_first() -> None:
    phrase = Phrase("red umbrella", "umbrella", 2, 14)
    assert row_of(phrase, {"red umbrella": 0, "umbrella": 1}) == 1
    assert row_of(phrase, {"red umbrella": 0}) == 0
    assert row_of(phrase, {"cup": 0}) is None


def test_what_captions_call_a_given_class_stands_for_it() -> None:
    pool = [Concept("television", 3, kind="head"), Concept("tv", 9, kind="given", synonyms=("telly",))]
    pool.append(Concept("skis", 1, kind="given"))
    rows = rows_of(pool)
    assert (rows["telly"], rows["tv"], rows["ski"], rows["television"]) == (1, 1, 2, 0)


def test_a_region_says_how_much_of_the_probability_is_stored(mined: Path) -> None:
    table = pq.read_table(mined / "shard-00000.parquet").to_pylist()
    assert table
    for row in table:
        assert row["kept_mass"] == pytest.approx(sum(row["concept_probs"]), abs=1e-6)
        assert 0 < row["kept_mass"] <= 1 + 1e-6
    assert next(read_regions(mined)).kept_mass == pytest.approx(table[0]["kept_mass"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_run_ends_its_workers(
    mining_options: list[str],
    swapped: Swap,
    tmp_path: Path,
    after_import: AfterImport,
    patience: float,
    number: signal.Signals,
) -> None:
    out = tmp_path / "mined"
    command = ["mine", *swapped(mining_options, shard_images=1), f"out={out}", "workers=2"]
    environment = after_import("regionclip.mining.shards", WAITING)
    running = command_line(*command, OMP_NUM_THREADS="1", **environment)
    session, deadline = running.pid, time.monotonic() + patience
    while not list(out.glob("*.parquet")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(number)
    assert running.wait(patience) == 130
    (tmp_path / "go on").touch()  # a worker whose parent was killed ends at its next report, not before
    _, told = running.communicate(timeout=patience)
    assert "Traceback" not in told
    assert told.endswith("stopped; the same command resumes from here\n")
    while processes_of(session):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (out / "manifest.json").exists()


def processes_of(session: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(stat.parent.name)
    return found
