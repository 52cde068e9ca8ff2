"""Every reader of boxes gives them to the image of their name, and refuses boxes in another form."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clip_base.data.batch import ImageBatch
from clip_base.jobs.cli import main_regionclip
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json, write_json
from regionclip.data.region_tables import REGION_COLUMNS
from regionclip.proposals.precomputed import PrecomputedConfig, PrecomputedProposer
from regionclip.structures.regions import ImageInfo

Entry = dict[str, Any]
SIZES = ["resize.short=[64]", "resize.long=64", "precision=fp32"]


def proposed(file: Path, *keys: ImageInfo) -> list[list[float]]:
    """Returns the first box of each image, [] for none."""
    proposer = PrecomputedProposer(PrecomputedConfig(file=str(file)))
    images = ImageBatch.whole(torch.zeros(len(keys), 3, 64, 64))
    found = proposer(images, keys)
    return [(found.of_image(slot).boxes.tolist() or [[]])[0] for slot in range(len(keys))]


def entry(image_id: int, side: float, name: str = "") -> Entry:
    named = {"file_name": name} if name else {}
    return {"image_id": image_id, "bbox": [0, 0, side, side], "score": 0.5, **named}


def json_file(folder: Path, entries: list[Entry]) -> Path:
    write_json(folder / "boxes.json", entries)
    return folder / "boxes.json"


def parquet_file(folder: Path, entries: list[Entry]) -> Path:
    """As `mine` and `features` write regions, one row group for each."""
    schema = pa.schema(REGION_COLUMNS)
    with pq.ParquetWriter(folder / "boxes.parquet", schema) as file:
        for one in entries:
            x, y, w, h = one["bbox"]
            row = {"box": [x, y, x + w, y + h], "objectness": 0.5, "height": 64, "width": 64}
            row |= {"image_id": one["image_id"], "file_name": one.get("file_name")}
            file.write_table(pa.Table.from_pylist([row], schema=schema))
    return folder / "boxes.parquet"


each_kind = pytest.mark.parametrize("write", [json_file, parquet_file])
Write = Callable[[Path, list[Entry]], Path]


@each_kind
def test_an_images_boxes_are_those_of_its_name(write: Write, tmp_path: Path) -> None:
    file = write(tmp_path, [entry(1, 10, "photos/10.jpg"), entry(2, 20, "photos/2.jpg")])
    keys = [ImageInfo(2, 64, 64, "/data/photos/10.jpg"), ImageInfo(1, 64, 64, "2.jpg")]
    assert proposed(file, *keys) == [[0, 0, 10, 10], [0, 0, 20, 20]]
    assert proposed(file, ImageInfo(1, 64, 64, "photos/3.jpg")) == [[]]
    assert proposed(file, ImageInfo(2, 64, 64)) == [[0, 0, 20, 20]]  # in memory: it has no name


@each_kind
def test_without_names_the_number_decides(write: Write, tmp_path: Path) -> None:
    file = write(tmp_path, [entry(1, 10), entry(2, 20)])
    assert proposed(file, ImageInfo(2, 64, 64, "any.jpg")) == [[0, 0, 20, 20]]


@each_kind
def test_what_is_ambiguous_is_refused(write: Write, tmp_path: Path) -> None:
    two = [entry(1, 10, "a/1.jpg"), entry(2, 20, "b/1.jpg")]
    with pytest.raises(InputError, match=r"'1\.jpg' means several images of proposals file"):
        proposed(write(tmp_path, two), ImageInfo(1, 64, 64, "1.jpg"))
    with pytest.raises(InputError, match=r"a/1\.jpg and b/1\.jpg both mean the image with id 1"):
        proposed(
            write(tmp_path, [entry(1, 10, "1.jpg")]),
            *(ImageInfo(1, 64, 64, name) for name in ("a/1.jpg", "b/1.jpg")),
        )
    with pytest.raises(InputError, match=r"image_id 1 is used for both a\.jpg and b\.jpg"):
        proposed(write(tmp_path, [entry(1, 10, "a.jpg"), entry(1, 9, "b.jpg")]), ImageInfo(1, 64, 64))


def test_a_file_in_which_some_boxes_have_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 boxes have no file_name"):
        proposed(json_file(tmp_path, [entry(1, 10, "a.jpg"), entry(2, 9)]), ImageInfo(1, 64, 64))


FORMS: dict[str, Callable[..., list[float]]] = {
    "x1, y1, x2, y2": lambda x, y, w, h: [x, y, x + w, y + h],
    "x, y, width, height in shares of the image": lambda x, y, w, h: [side / 64 for side in (x, y, w, h)],
    "x1, y1, x2, y2 in shares of the image": lambda x, y, w, h: [side / 64 for side in (x, y, x + w, y + h)],
}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_in_another_form_are_refused(form: str, world: Path, tmp_path: Path) -> None:
    content = read_json(world / "instances_train.json")
    entries = [
        {"image_id": one["image_id"], "bbox": FORMS[form](*one["bbox"]), "score": 1}
        for one in content["annotations"]
    ]
    write_json(tmp_path / "boxes.json", entries)
    given = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}", *SIZES]
    proposer = ["proposer.name=precomputed", f"proposer.file={tmp_path / 'boxes.json'}"]
    assert main_regionclip(["propose", *given, *proposer, f"out={tmp_path / 'out'}"]) == 2
    for one, right in zip(entries, content["annotations"], strict=True):
        one["bbox"] = right["bbox"]
    write_json(tmp_path / "boxes.json", entries)
    assert main_regionclip(["propose", *given, *proposer, f"out={tmp_path / 'right'}"]) == 0
    assert read_json(tmp_path / "right" / "metrics.json")["recall@100"] == 1


@pytest.fixture
def renamed(world: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder of images whose sorted names are not in the order of their ids, and its annotations."""
    content = read_json(world / "instances_train.json")
    folder = tmp_path / "photos"
    folder.mkdir()
    numbers = list(range(1, len(content["images"]) + 1))
    random.Random(1).shuffle(numbers)
    for image, number in zip(content["images"], numbers, strict=True):
        shutil.copy(world / "images" / image["file_name"], folder / f"{number}.png")
        image["file_name"] = f"{number}.png"
    write_json(tmp_path / "truth.json", content)
    return folder, content


@pytest.fixture
def detections(renamed: tuple[Path, dict[str, Any]], detector_file: Path, tmp_path: Path) -> Path:
    """What `detect` finds in that folder; its image_id counts the sorted names."""
    options = [
        "vocabulary=cup, star",
        f"weights={detector_file}",
        "use_checkpoint_config=false",
        "draw=false",
    ]
    out = tmp_path / "found"
    assert main_regionclip(["detect", str(renamed[0]), *SIZES, *options, f"out={out}"]) == 0
    return out / "detections.json"


def by_annotated_id(file: Path, content: dict[str, Any], target: Path) -> Path:
    """Writes detections with the annotations' ids and without names: what all readers must make of them."""
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    entries = read_json(file)
    right = [
        {"image_id": ids[Path(one["file_name"]).name], **{key: one[key] for key in ("bbox", "score")}}
        for one in entries
    ]
    assert [one["image_id"] for one in right] != [one["image_id"] for one in entries]
    write_json(target, right)
    return target


def test_our_own_detections_serve_as_proposals_of_annotated_images(
    renamed: tuple[Path, dict[str, Any]], detections: Path, clip_file: Path, tmp_path: Path
) -> None:
    folder, content = renamed
    given = [f"annotations={tmp_path / 'truth.json'}", f"images={folder}", *SIZES]
    right = by_annotated_id(detections, content, tmp_path / "right.json")
    found: dict[str, list[Any]] = {}
    for name, file in (("right", right), ("own", detections)):
        proposer = ["proposer.name=precomputed", f"proposer.file={file}"]
        assert main_regionclip(["propose", *given, *proposer, f"out={tmp_path / f'p-{name}'}"]) == 0
        words = [f"weights={clip_file}", f"boxes={file}", "report=false"]
        assert main_regionclip(["evaluate", *given, *words, f"out={tmp_path / f'e-{name}'}"]) == 0
        regions = [f"weights={clip_file}", f"regions_from={file}"]
        assert main_regionclip(["features", *given, *regions, f"out={tmp_path / f'f-{name}'}"]) == 0
        (shard,) = (tmp_path / f"f-{name}").glob("*.parquet")
        found[name] = [
            read_json(tmp_path / f"p-{name}" / "proposals.json"),
            read_json(tmp_path / f"e-{name}" / "results.json"),
            pq.read_table(shard).to_pylist(),
        ]
    assert len(found["right"][0]) > 20
    assert found["own"] == found["right"]


def test_features_of_a_folder_take_detections_and_features_by_name(
    renamed: tuple[Path, dict[str, Any]], detections: Path, clip_file: Path, tmp_path: Path
) -> None:
    """Of some images in another order: their numbers are not those of the file."""
    folder, _ = renamed
    some = [str(folder / f"{number}.png") for number in (9, 10, 2)]
    first, again = tmp_path / "first", tmp_path / "again"
    options = [f"weights={clip_file}", *SIZES]
    assert main_regionclip(["features", *some, *options, f"regions_from={detections}", f"out={first}"]) == 0
    (shard,) = first.glob("*.parquet")
    wanted = pq.read_table(shard).to_pylist()
    assert {row["file_name"] for row in wanted} == set(some)
    corners: dict[str, list[list[float]]] = {}
    for one in read_json(detections):
        corners.setdefault(one["file_name"], []).append(one["bbox"][:2])
    for row in wanted:
        apart = torch.tensor(corners[row["file_name"]]) - torch.tensor(row["box"][:2])
        assert float(apart.abs().amax(1).min()) < 0.01

    few = [some[2], some[0]]
    assert main_regionclip(["features", *few, *options, f"regions_from={shard}", f"out={again}"]) == 0
    (shard,) = again.glob("*.parquet")
    rows = {(row["file_name"], *row["box"]): row["embedding"] for row in wanted}
    found = pq.read_table(shard).to_pylist()
    assert {row["file_name"] for row in found} == set(few)
    for row in found:
        torch.testing.assert_close(
            torch.tensor(row["embedding"]),
            torch.tensor(rows[row["file_name"], *row["box"]]),
            atol=2e-3,
            rtol=0,
        )


def test_boxes_of_another_folders_image_of_the_same_name_are_not_taken(
    renamed: tuple[Path, dict[str, Any]],
    clip_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = renamed
    other = shutil.copytree(folder, tmp_path / "others")
    options = [f"weights={clip_file}", *SIZES]

    def features(names: list[str], out: str) -> tuple[int, str]:
        entries = [{"bbox": [0, 0, 20, 20], "score": 1.0, "file_name": name} for name in names]
        write_json(tmp_path / "boxes.json", entries)
        given = [str(folder / "1.png"), f"regions_from={tmp_path / 'boxes.json'}"]
        code = main_regionclip(["features", *given, *options, f"out={tmp_path / out}"])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = features([str(other / "1.png")], "a")
    assert code == 2
    assert "has no box in any of the 1 images" in said
    code, said = features([str(folder / "1.png"), str(other / "1.png")], "b")
    assert code == 0
    assert "note: 1 images of" in said
    code, said = features(["x/1.png", "1.png"], "c")
    assert code == 0, said
    code, said = features([str(folder / "1.png"), "1.png"], "d")
    assert code == 2
    assert "both mean the image" in said
