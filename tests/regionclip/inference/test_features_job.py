"""Embeddings of regions in files: as one image at a time gives them, and whole after any kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import regionclip as package
from clip_base.storage.files import read_json
from regionclip.inference import feature_extractor
from regionclip.proposals.storage import ProposalTable

Command = Callable[..., tuple[int, str]]
AfterImport = Callable[[str, str], dict[str, str]]
Table = dict[str, Any]

# Stands for regionclip.inference.feature_extractor.write_table: all shards but the first are never written.
UNFINISHED = """
import time

real = module.write_table

def write(path, *rest):
    while path.name != "shard-00000.parquet":
        time.sleep(1)
    real(path, *rest)

module.write_table = write
"""


@pytest.fixture(scope="module")
def photos(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve images, three of them upright."""
    folder = shutil.copytree(world / "images" / "train", tmp_path_factory.mktemp("photos") / "photos")
    for file in sorted(folder.iterdir())[::4]:
        Image.open(file).crop((0, 0, 48, 64)).save(file)
    return folder


@pytest.fixture
def options(detector_file: Path, tmp_path: Path) -> list[str]:
    sizes = ["resize.short=[64]", "resize.long=96", "batch_size=3", "shard_images=5", "precision=fp32"]
    return [
        f"weights={detector_file}",
        *sizes,
        "use_checkpoint_config=false",
        "max_regions=7",
        f"out={tmp_path / 'out'}",
    ]


def table_of(out: Path) -> Table:
    """Returns the columns of all shards; boxes and embeddings as matrices."""
    table = pq.read_table(sorted(out.glob("*.parquet")))
    columns: Table = {name: table[name].to_pylist() for name in table.column_names}
    for name in ("box", "embedding"):
        columns[name] = table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return columns


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "config.yaml"}


def test_rows_are_what_one_picture_at_a_time_gives(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    arguments = ["vocabulary=cup, star, dog", "top_k=2", "dtype=float32", "whole_image=true"]
    assert regionclip("features", photos, *options, *arguments)[0] == 0
    table, files = table_of(tmp_path / "out"), sorted(photos.iterdir())
    assert list(dict.fromkeys(table["file_name"])) == [str(file) for file in files]
    predictor = package.load(options[0].removeprefix("weights="), ["cup", "star", "dog"], precision="fp32")
    predictor.resize.short, predictor.resize.long = [64], 96
    names = np.array(table["file_name"])
    assert len(names) > 4 * len(files)
    for number, file in enumerate(files, 1):
        mine = np.flatnonzero(names == str(file))
        first = int(mine[0])
        width, height = Image.open(file).size
        assert (table["height"][first], table["width"][first]) == (height, width)
        assert [table["whole_image"][row] for row in mine] == [True] + [False] * (len(mine) - 1)
        assert table["box"][first].tolist() == [0, 0, width, height]
        assert {table["image_id"][row] for row in mine} == {number}
        wanted = predictor.region_features(file, torch.from_numpy(table["box"][mine].copy()))
        np.testing.assert_allclose(table["embedding"][mine], wanted.numpy(), atol=2e-3)
        np.testing.assert_allclose(table["embedding"][first], predictor.image_features(file)[0], atol=2e-3)
        scores = [table["objectness"][row] for row in mine[1:]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) <= 7
        ranked = predictor.classify_embeddings(wanted[:1], 2)[0]
        assert table["names"][first] == [name for name, _ in ranked]
        assert table["probabilities"][first] == pytest.approx([value for _, value in ranked], abs=5e-3)


def test_half_precision_and_unit_length_are_the_default(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    assert regionclip("features", photos, *options)[0] == 0
    table = table_of(tmp_path / "out")
    assert table["embedding"].dtype == np.float16
    lengths = np.linalg.norm(table["embedding"].astype(np.float32), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=2e-3)
    assert set(table["names"]) == {None}
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["regions"] == len(lengths)
    assert (manifest["images"], manifest["skipped"]) == (12, 0)
    assert manifest["shards"] == [path.name for path in sorted((tmp_path / "out").glob("*.parquet"))]
    boxes, _ = ProposalTable(tmp_path / "out").of_image(3)  # the shards serve as proposals, too
    assert len(boxes) == table["image_id"].count(3)


def test_the_documented_lines_read_the_files_back(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert regionclip("features", photos, *options[:-1])[0] == 0  # into features/, the default
    text = (Path(__file__).parents[3] / "docs" / "detection.md").read_text(encoding="utf-8")
    held: Table = {}
    exec(text.partition("```python\n")[2].partition("```")[0], held)
    assert held["embeddings"].shape == (len(held["table"]), 32)
    np.testing.assert_array_equal(held["embeddings"], table_of(tmp_path / "features")["embedding"])


def test_npz_holds_what_parquet_holds(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    arguments = ["features", photos, *options[:-1], "vocabulary=cup, star", "top_k=1"]
    assert regionclip(*arguments, f"out={tmp_path / 'out'}")[0] == 0
    assert regionclip(*arguments, f"out={tmp_path / 'npz'}", "format=npz")[0] == 0
    table = table_of(tmp_path / "out")
    for file in sorted(photos.iterdir()):
        mine = [row for row, name in enumerate(table["file_name"]) if name == str(file)]
        with np.load(tmp_path / "npz" / f"{file.stem}.npz") as held:  # allow_pickle is False
            assert str(held["file_name"]) == str(file)
            np.testing.assert_array_equal(held["embeddings"], table["embedding"][mine])
            np.testing.assert_array_equal(held["boxes"], table["box"][mine])
            assert held["names"].tolist() == [table["names"][row] for row in mine]


def test_true_boxes_carry_their_categories(
    world: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    annotations = world / "instances_train.json"
    arguments = [*options, f"annotations={annotations}", f"images={world / 'images'}", "regions_from=truth"]
    assert regionclip("features", *arguments, "whole_image=true")[0] == 0
    table, truth = table_of(tmp_path / "out"), read_json(annotations)
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    files = {entry["id"]: entry["file_name"] for entry in truth["images"]}
    wanted = sorted(
        (entry["image_id"], files[entry["image_id"]], names[entry["category_id"]], *entry["bbox"])
        for entry in truth["annotations"]
    )
    boxes = table["box"].astype(float)
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(table["image_id"], table["file_name"], table["category"], boxes.tolist(), strict=True)
    found = sorted((a, b, c, *box) for a, b, c, box in rows if c is not None)
    assert [row[:3] for row in found] == [row[:3] for row in wanted]
    assert [side for row in found for side in row[3:]] == pytest.approx(
        [side for row in wanted for side in row[3:]], abs=0.01
    )
    assert table["whole_image"].count(True) == len(files)


def test_boxes_come_from_a_file_by_name_or_by_id(
    world: Path, photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    """What `detect` wrote is such a file."""
    found, files = tmp_path / "found", sorted(photos.iterdir())
    some = files[2:5]
    assert regionclip("detect", *some, options[0], "vocabulary=cup", f"out={found}", "draw=false")[0] == 0
    arguments = [f"regions_from={found / 'detections.json'}", "max_regions=2"]
    assert regionclip("features", photos, *options, *arguments)[0] == 0
    table, entries = table_of(tmp_path / "out"), read_json(found / "detections.json")
    assert set(table["file_name"]) == {str(file) for file in some}
    best = max((entry for entry in entries if entry["file_name"] == str(some[0])), key=lambda e: e["score"])
    x, y, w, h = best["bbox"]
    assert table["box"][0].tolist() == pytest.approx([x, y, x + w, y + h], abs=0.01)
    assert table["image_id"].count(3) == 2
    truth = read_json(world / "instances_train.json")
    image = truth["images"][1]["id"]
    boxes = [{"image_id": image, "bbox": [1, 2, 30, 40], "score": 0.5}]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    named = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    by_id = [*options[:-1], f"out={tmp_path / 'ids'}", *named, f"regions_from={tmp_path / 'boxes.json'}"]
    assert regionclip("features", *by_id)[0] == 0
    assert (table_of(tmp_path / "ids")["image_id"], table_of(tmp_path / "ids")["objectness"]) == (
        [image],
        [0.5],
    )
    code, told = regionclip("features", photos, *options[:-1], f"out={tmp_path / 'no'}", by_id[-1])
    assert code == 2
    assert "entry 0: has no file_name" in told


def test_any_proposer_serves_a_clip_and_whole_images_need_none(
    photos: Path, options: list[str], clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    clip = [f"weights={clip_file}", *options[1:-1], f"out={tmp_path / 'out'}"]
    code, told = regionclip("features", photos, *clip)
    assert code == 2
    assert "give, for example, proposer.name=grid" in told
    assert regionclip("features", photos, *clip, "proposer.name=grid")[0] == 0
    assert table_of(tmp_path / "out")["image_id"].count(1) == 7
    whole = [*clip[:-1], f"out={tmp_path / 'whole'}", "regions_from=none"]
    code, told = regionclip("features", photos, *whole)
    assert code == 2
    assert "whole_image=true" in told
    assert regionclip("features", photos, *whole, "whole_image=true")[0] == 0
    assert table_of(tmp_path / "whole")["whole_image"] == [True] * 12


def test_a_broken_picture_costs_only_itself(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    broken = sorted(folder.iterdir())[6]
    broken.write_bytes(b"no picture")
    assert regionclip("features", folder, *options)[0] == 0
    assert broken.name in (tmp_path / "out" / "skipped.jsonl").read_text()
    table = table_of(tmp_path / "out")
    assert set(table["file_name"]) == {str(file) for file in folder.iterdir() if file != broken}
    assert read_json(tmp_path / "out" / "manifest.json")["skipped"] == 1


@pytest.mark.parametrize("form", ["parquet", "npz"])
def test_a_stopped_run_ends_as_an_undisturbed_one(
    photos: Path,
    options: list[str],
    tmp_path: Path,
    regionclip: Command,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    """It is stopped as a file is to be written: a shard or an image's arrays, the record of a shard."""
    arguments = ["features", photos, *options[:-1], f"format={form}", "vocabulary=cup, star"]
    assert regionclip(*arguments, f"out={tmp_path / 'undisturbed'}")[0] == 0
    out = tmp_path / "out"
    for call in (0, 1, 3):
        calls: list[object] = []

        def stop(real: Callable[..., object], call: int, calls: list[object]) -> Callable[..., object]:
            def write(*values: object) -> object:
                calls.append(values)
                if len(calls) > call:
                    raise KeyboardInterrupt
                return real(*values)

            return write

        for name in ("write_table", "write_arrays", "write_json"):
            monkeypatch.setattr(feature_extractor, name, stop(getattr(feature_extractor, name), call, calls))
        assert regionclip(*arguments, f"out={out}")[0] == 130
        assert not (out / "metrics.json").exists()
        monkeypatch.undo()
    assert regionclip(*arguments, f"out={out}")[0] == 0
    assert content(out) == content(tmp_path / "undisturbed")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as each of several processes has: the last bit of a matrix product depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_what_two_killed_processes_began_ends_as_an_undisturbed_run(
    photos: Path,
    options: list[str],
    tmp_path: Path,
    regionclip: Command,
    after_import: AfterImport,
    patience: float,
) -> None:
    arguments = ["features", str(photos), *options[:-1], "shard_images=1"]
    assert regionclip(*arguments, f"out={tmp_path / 'undisturbed'}")[0] == 0
    out = tmp_path / "out"
    code = (
        "from clip_base.jobs.cli import main_regionclip; import sys; sys.exit(main_regionclip(sys.argv[1:]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, f"out={out}", "workers=2"],
        start_new_session=True,
        env={**os.environ, **after_import("regionclip.inference.feature_extractor", UNFINISHED)},
    )
    deadline = time.monotonic() + patience
    while not list(out.glob(".shard-*.json")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert regionclip(*arguments, f"out={out}")[0] == 0
    assert content(out) == content(tmp_path / "undisturbed")
    kept = [name for name, stamp in done.items() if (out / name).stat().st_mtime_ns == stamp]
    assert kept


def test_a_finished_folder_is_left_alone_and_another_run_refused(
    photos: Path, options: list[str], tmp_path: Path, regionclip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    assert regionclip("features", folder, *options)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert regionclip("features", folder, *options)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, told = regionclip("features", folder, *options, "max_regions=3")
    assert code == 2
    assert "max_regions=7 there, 3 here" in told
    (folder / "one_more.jpg").write_bytes(sorted(folder.iterdir())[0].read_bytes())
    code, told = regionclip("features", folder, *options)
    assert code == 2
    assert "list of images changed since" in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["regions_from=truth"], "regions_from=truth needs annotations"),
        (["annotations=a.json", "other.jpg"], "the one folder"),
        (["regions_from=none"], "nothing to embed"),
        (["regions_from=b.json", "proposer.name=grid"], "give one of them"),
        (["regions_from=b.parquet"], "does not exist"),
        (["max_regions=0"], "at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    photos: Path, options: list[str], regionclip: Command, given: list[str], told: str
) -> None:
    code, error = regionclip("features", photos, *options, *given)
    assert code == 2
    assert told in error
    assert error.count("\n") == 1
