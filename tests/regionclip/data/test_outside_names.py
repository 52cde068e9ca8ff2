"""File names in data lead into the folder that the user gave for the images, unless that is allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_base.data.sources import SOURCES
from clip_base.evaluation.datasets import coco_images
from clip_base.evaluation.retrieval import RetrievalConfig, captioned
from clip_base.jobs.cli import main_regionclip
from clip_base.jobs.config import build_plugin
from clip_base.runtime.errors import InputError
from clip_base.runtime.workers import run
from clip_base.storage.files import read_json, write_json
from clip_base.storage.limits import MEGAPIXELS, OUTSIDE_IMAGES, limits_set, split_limits
from clip_base.storage.paths import image_in
from regionclip.data.annotations import CocoDetection
from regionclip.mining.shards import VERSION, MinedRegion, read_regions, shard_path, write_rows
from regionclip.training.mined import MinedSamples

OUTSIDE = {"absolute": "{tmp}/other/a.jpg", "above": "../other/a.jpg", "through": "x/../../other/a.jpg"}


def coco(file: Path, name: str) -> Path:
    image = {"id": 1, "file_name": name, "height": 8, "width": 8}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "iscrowd": 0, "caption": "a cup"}
    write_json(file, {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cup"}]})
    return file


def source(**config: object) -> list[Path]:
    return [pair.image for pair in build_plugin(SOURCES, {k: str(v) for k, v in config.items()}).pairs()]


def csv(folder: Path, name: str, **more: object) -> list[Path]:
    (folder / "t.csv").write_text(f"image,caption\n{name},a cup\n")
    return source(name="csv", file=folder / "t.csv", **more)


def jsonl(folder: Path, name: str, **more: object) -> list[Path]:
    (folder / "t.jsonl").write_text(json.dumps({"image": name, "caption": "a cup"}) + "\n")
    return source(name="jsonl", file=folder / "t.jsonl", **more)


def parquet(folder: Path, name: str, **more: object) -> list[Path]:
    pq.write_table(pa.table({"image": [name], "caption": ["a cup"]}), folder / "t.parquet")
    return source(name="parquet", file=folder / "t.parquet", **more)


def captions(folder: Path, name: str, images: Path) -> list[Path]:
    return source(name="coco", captions=coco(folder / "c.json", name), images=images)


def detection(folder: Path, name: str, images: Path) -> list[Path]:
    return [record.path for record in CocoDetection(coco(folder / "c.json", name), images)]


def classified(folder: Path, name: str, images: Path) -> list[Any]:
    return [one.path for one in coco_images(str(coco(folder / "c.json", name)), str(images))[1]]


def retrieved(folder: Path, name: str, images: Path) -> list[Any]:
    config = RetrievalConfig(weights="w", captions=str(coco(folder / "c.json", name)), images=str(images))
    return [one.path for one in captioned(config)[0]]


def trained(folder: Path, name: str, images: Path) -> list[Any]:
    region = MinedRegion(1, name, 8, 8, (0, 0, 4, 4), None, [0], [1.0], "cup", None, None)  # type: ignore[arg-type]
    region = replace(region, objectness=0.5)
    write_rows(shard_path(folder / "mined", 0), [region])
    counts = {"samples": [1], "max_concepts": 1, "regions": 1}
    manifest = {"version": VERSION, "shards": ["shard-00000.parquet"], "tars": {}, **counts}
    write_json(folder / "mined" / "manifest.json", {**manifest, "images_folder": str(images)})
    return [sample.path for sample in MinedSamples(folder / "mined", folder / "cache", str(images))]


READERS: dict[str, Callable[..., list[Any]]] = {
    "csv": csv,
    "jsonl": jsonl,
    "parquet": parquet,
    "captions": captions,
    "annotations": detection,
    "boxes to classify": classified,
    "retrieval": retrieved,
    "mined regions": trained,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images/x", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("images/a.jpg", "other/a.jpg"):
        (tmp_path / name).write_bytes(b"-")
    return tmp_path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_name_that_leads_out_is_refused_unless_that_is_allowed(
    reader: str, kind: str, folder: Path
) -> None:
    name, read = OUTSIDE[kind].format(tmp=folder), READERS[reader]
    with pytest.raises(InputError, match=r"leads out of the images folder .*--outside-images"):
        read(folder, name, images=folder / "images")
    with limits_set({OUTSIDE_IMAGES.variable: "1"}):
        (found,) = read(folder, name, images=folder / "images")
    assert Path(found).resolve() == folder / "other" / "a.jpg"


@pytest.mark.parametrize("reader", READERS)
def test_absolute_names_within_the_folder_are_names_like_others(reader: str, folder: Path) -> None:
    (found,) = READERS[reader](folder, f"{folder}/images/a.jpg", images=folder / "images")
    assert found == folder / "images" / "a.jpg"


@pytest.mark.parametrize("reader", ["csv", "jsonl", "parquet"])
def test_a_table_without_a_folder_may_name_any_image(reader: str, folder: Path) -> None:
    (found,) = READERS[reader](folder, f"{folder}/other/a.jpg")
    assert found == folder / "other" / "a.jpg"


def test_links_in_the_folder_are_followed(folder: Path) -> None:
    (folder / "images" / "link").symlink_to(folder / "other")
    assert image_in(folder / "images", "link/a.jpg", "here").read_bytes() == b"-"


def test_mining_reads_no_image_outside(mining_options: list[str], world: Path, tmp_path: Path) -> None:
    content = read_json(world / "captions_train.json")
    (tmp_path / "images").symlink_to(world / "images")
    names = [entry["file_name"] for entry in content["images"]]
    given = [option for option in mining_options if not option.startswith(("images=", "captions="))]
    given += [f"images={tmp_path / 'images'}", f"captions={tmp_path / 'c.json'}"]
    for count, code in ((1, 2), (len(names), 2)):
        for entry, name in list(zip(content["images"], names, strict=True))[:count]:
            entry["file_name"] = f"{world}/images/{name}"
        write_json(tmp_path / "c.json", content)
        assert main_regionclip(["mine", *given, f"out={tmp_path / 'out'}"]) == code
    assert main_regionclip(["mine", "--outside-images", *given, f"out={tmp_path / 'out'}"]) == 0


@pytest.mark.parametrize("name", ["../a.parquet", "/a.parquet"])
def test_a_manifest_names_shards_of_its_folder_alone(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"version": VERSION, "shards": [name]})
    with pytest.raises(InputError, match="is not in its folder"):
        list(read_regions(tmp_path))


def limit_of_worker() -> Callable[[object, object], float]:
    return lambda task, report: MEGAPIXELS.value


def test_workers_have_the_limits_of_the_command() -> None:
    rest, limits = split_limits(["mine", "--max-megapixels", "7", "out=x", "outside_images=true"])
    assert rest == ["mine", "out=x"]
    with limits_set(limits):
        assert [value for _, value in run("local", limit_of_worker, [1, 2], workers=2)] == [7.0, 7.0]
    assert OUTSIDE_IMAGES.variable not in os.environ


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-megapixels", "many"], "--max-megapixels must be a positive number, found 'many'"),
        (["--max-unpacked-gb"], "--max-unpacked-gb must be a positive number, found ''"),
        (["outside_images=perhaps"], "--outside-images must be true or false, found 'perhaps'"),
    ],
)
def test_a_limit_that_is_none_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_regionclip(["doctor", *words]) == 2
    assert told in capsys.readouterr().err


def test_help_lists_the_limits_of_every_job() -> None:
    code = "from clip_base.jobs.cli import main_regionclip; main_regionclip(['mine', '--help-all'])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "\noptions of every job:\n  max_megapixels (float, default 178.0)\n" in shown
