"""`report` and `pretrain` find the images of mined regions by file name in captions and annotations.

Numbers alone would give regions another image's captions and true boxes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.runtime.errors import InputError, InputNote
from clip_base.storage.files import read_json, write_json
from regionclip.data.annotations import CocoDetection
from regionclip.data.file_names import ids_by_name
from regionclip.mining.quality import measure_pairs
from regionclip.mining.shards import read_regions
from regionclip.training.mined import MinedSamples

Command = Callable[..., tuple[int, str]]


def renumbered(content: dict[str, Any]) -> dict[str, Any]:
    """The same file whose images are numbered backwards: every id is another image's."""
    content = copy.deepcopy(content)
    ids = [entry["id"] for entry in content["images"]]
    new = dict(zip(ids, reversed(ids), strict=True))
    for entry in content["images"]:
        entry["id"] = new[entry["id"]]
    for entry in content["annotations"]:
        entry["image_id"] = new[entry["image_id"]]
    return content


@pytest.fixture
def other(world: Path, tmp_path: Path) -> Path:
    """The world's captions and annotations of the training images, numbered otherwise."""
    for name in ("captions", "instances"):
        write_json(tmp_path / f"{name}.json", renumbered(read_json(world / f"{name}_train.json")))
    return tmp_path


def test_the_true_boxes_of_a_renumbered_file_are_those_of_the_same_images(
    mined: Path, world: Path, other: Path
) -> None:
    regions = list(read_regions(mined))
    wanted = measure_pairs(regions, CocoDetection(world / "instances_train.json", None), None)
    with pytest.warns(InputNote, match="found by file_name: 12 of 12 images"):
        found = measure_pairs(regions, CocoDetection(other / "instances.json", None), None)
    assert wanted.metrics() == found.metrics()
    assert wanted.labels.words() == found.labels.words()
    assert "correct" in wanted.labels.words()


def test_a_report_on_renumbered_files_has_the_same_figures(
    mined: Path, world: Path, other: Path, regionclip: Command, tmp_path: Path
) -> None:
    metrics = []
    for place, name in ((world, "_train"), (other, "")):
        out = tmp_path / f"report{name}"
        given = f"annotations={place}/instances{name}.json"
        code, told = regionclip("report", f"mined={mined}", given, f"out={out}")
        assert code == 0, told
        metrics.append(read_json(out / "metrics.json"))
    assert metrics[0] == metrics[1]
    assert "note: images are found by file_name" in told


def test_training_takes_the_captions_of_the_same_images(mined: Path, other: Path, tmp_path: Path) -> None:
    wanted = MinedSamples(mined, tmp_path / "cache")
    with pytest.warns(InputNote, match="found by file_name"):
        found = MinedSamples(mined, tmp_path / "cache", captions=str(other / "captions.json"))
    assert [sample.captions for sample in found] == [sample.captions for sample in wanted]
    assert len({sample.captions for sample in wanted}) > 2


def test_captions_of_other_images_are_refused(
    mined: Path, world: Path, clip_file: Path, regionclip: Command, tmp_path: Path
) -> None:
    content = read_json(world / "captions_train.json")
    for entry in content["images"]:
        entry["file_name"] = f"other/{entry['id']}-x.jpg"
    write_json(tmp_path / "captions.json", content)
    given = [f"weights={clip_file}", "train.steps=1", f"captions={tmp_path}/captions.json"]
    code, told = regionclip("pretrain", f"mined={mined}", *given, f"out={tmp_path / 'out'}")
    assert code == 2
    assert "has none of the 12 images of the mined regions" in told


def test_ids_are_found_by_name_and_what_is_absent_is_said() -> None:
    with pytest.warns(InputNote, match="1 of 2 images of shards are not in captions, such as b.jpg"):
        assert ids_by_name({1: "x/a.jpg", 2: "b.jpg"}, {1: "a.jpg"}, "shards", "captions") == {1: 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids_by_name({1: "x/a.jpg"}, {1: "a.jpg", 5: "c.jpg"}, "shards", "captions") == {1: 1}
    with pytest.raises(InputError, match="means several images"):
        ids_by_name({1: "a.jpg"}, {3: "x/a.jpg", 4: "y/a.jpg"}, "shards", "captions")
