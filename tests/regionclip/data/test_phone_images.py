"""Images that a camera stored on their side, with upright boxes, are those images stored upright."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clip_base.jobs.cli import main_regionclip
from clip_base.storage.files import read_json, write_json
from regionclip.data.annotations import CocoDetection
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.samples import RegionDataset, Sample

Swap = Callable[..., list[str]]
Options = dict[str, object]

WIDTH = 96  # of an upright image, 64 pixels high
BACK = {1: 1, 3: 3, 6: 8, 8: 6}
TURNS = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}


def store(image: Image.Image, path: Path, orientation: int) -> None:
    """Writes an upright image as a camera does that was held another way."""
    turn = TURNS[BACK[orientation]]
    note = Image.Exif()
    note[0x0112] = orientation
    (image if turn is None else image.transpose(turn)).save(path, exif=note)


@pytest.fixture(scope="module")
def phone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """Makes a folder of images and annotations, phone(orientation, ending), of the same upright images."""

    def make(orientation: int, ending: str) -> Path:
        folder = tmp_path_factory.mktemp(f"phone{orientation}")
        (folder / "images" / "train").mkdir(parents=True)
        for name in ("instances_train.json", "captions_train.json"):
            content = read_json(world / name)
            for entry in content["images"]:
                file = Path(entry["file_name"]).with_suffix(ending)
                wide = np.full((64, WIDTH, 3), 99, np.uint8)
                wide[:, :64] = np.asarray(Image.open(world / "images" / entry["file_name"]))
                store(Image.fromarray(wide), folder / "images" / file, orientation)
                entry |= {"file_name": str(file), "height": 64, "width": WIDTH}
            write_json(folder / name, content)
        return folder

    return make


PHONES = [(6, ".png"), (8, ".png"), (3, ".png"), (6, ".tiff"), (3, ".tiff")]
each_phone = pytest.mark.parametrize(("orientation", "ending"), PHONES)
Phone = Callable[[int, str], Path]


def run(*arguments: str) -> None:
    assert main_regionclip([*arguments]) == 0


def annotated(folder: Path) -> list[str]:
    return [f"annotations={folder / 'instances_train.json'}", f"images={folder / 'images'}"]


def small() -> list[str]:
    return ["resize.short=[64]", "resize.long=96", "precision=fp32"]


@each_phone
def test_mining(
    orientation: int, ending: str, phone: Phone, mining_options: list[str], swapped: Swap, tmp_path: Path
) -> None:
    tables = []
    for name, folder in (("upright", phone(1, ending)), ("phone", phone(orientation, ending))):
        changes = {"images": folder / "images", "captions": folder / "captions_train.json", "resize.long": 96}
        run("mine", *swapped(mining_options, **changes), f"out={tmp_path / name}")
        shards = sorted((tmp_path / name).glob("*.parquet"))
        tables.append([row for shard in shards for row in pq.read_table(shard).to_pylist()])
    upright, turned = tables
    assert len(upright) > 20
    assert turned == upright


@each_phone
def test_features_of_annotated_and_of_plain_folders(
    orientation: int, ending: str, phone: Phone, detector_file: Path, tmp_path: Path
) -> None:
    for kind in ("annotated", "plain"):
        found = []
        for name, folder in (("upright", phone(1, ending)), ("phone", phone(orientation, ending))):
            images = (
                [str(folder / "images" / "train")]
                if kind == "plain"
                else [*annotated(folder), "regions_from=truth"]
            )
            out = tmp_path / f"{kind}-{name}"
            run(
                "features",
                *images,
                *small(),
                "use_checkpoint_config=false",
                f"weights={detector_file}",
                f"out={out}",
            )
            (shard,) = out.glob("*.parquet")
            found.append(pq.read_table(shard).drop_columns("file_name").to_pylist())
        assert len(found[0]) > 5
        assert found[0] == found[1]


@each_phone
def test_evaluation(orientation: int, ending: str, phone: Phone, clip_file: Path, tmp_path: Path) -> None:
    found = []
    for name, folder in (("upright", phone(1, ending)), ("phone", phone(orientation, ending))):
        options = ["boxes=truth", "report=false", f"weights={clip_file}", f"out={tmp_path / name}"]
        run("evaluate", *annotated(folder), *small(), *options)
        found.append(read_json(tmp_path / name / "results.json"))
    assert len(found[0]) > 20
    assert found[0] == found[1]


@each_phone
def test_detection(orientation: int, ending: str, phone: Phone, detector_file: Path, tmp_path: Path) -> None:
    found: list[list[dict[str, Any]]] = []
    for name, folder in (("upright", phone(1, ending)), ("phone", phone(orientation, ending))):
        options = [
            "vocabulary=cup, star",
            "use_checkpoint_config=false",
            "draw=false",
            f"weights={detector_file}",
        ]
        run("detect", str(folder / "images" / "train"), *small(), *options, f"out={tmp_path / name}")
        entries = read_json(tmp_path / name / "detections.json")
        found.append([{**entry, "file_name": Path(entry["file_name"]).name} for entry in entries])
    assert len(found[0]) > 5
    assert found[0] == found[1]


@each_phone
def test_training_samples(orientation: int, ending: str, phone: Phone) -> None:
    resize = TrainingResizeConfig(short=[64], long=96, flip=False)
    items = []
    for folder in (phone(1, ending), phone(orientation, ending)):
        dataset = CocoDetection(folder / "instances_train.json", folder / "images")
        data = RegionDataset([Sample.of_record(record) for record in dataset], resize)
        items.append([data.item(index, torch.Generator()) for index in range(4)])
    for (upright, regions, _), (turned, same, _) in zip(*items, strict=True):
        np.testing.assert_array_equal(turned, upright)
        assert same.boxes.equal(regions.boxes)


@each_phone
def test_detectron2s_mapper(orientation: int, ending: str, phone: Phone) -> None:
    pytest.importorskip("detectron2")
    from regionclip.detectron2 import RegionMapper

    mapper = RegionMapper(is_train=False, resize=TrainingResizeConfig(short=[64], long=96))
    mapped = []
    for folder in (phone(1, ending), phone(orientation, ending)):
        entry = read_json(folder / "instances_train.json")["images"][0]
        sizes = {"height": entry["height"], "width": entry["width"]}
        mapped.append(mapper({"file_name": str(folder / "images" / entry["file_name"]), **sizes})["image"])
    assert mapped[0].equal(mapped[1])
