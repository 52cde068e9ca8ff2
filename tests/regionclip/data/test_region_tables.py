"""Tables that hold what no job writes are refused, by file, row and column, wherever they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools import mask
from safetensors.torch import save_file

from clip_base.runtime.errors import InputError
from regionclip.data.results import checked_result, runs_of
from regionclip.mining import shards
from regionclip.mining.shards import VERSION, read_regions, shard_path
from regionclip.proposals import storage
from regionclip.proposals.storage import ProposalTable

ROWS = 7
BAD = 4  # the row that a test changes


def columns() -> dict[str, list[Any]]:
    """Rows as mining writes them."""
    return {
        "image_id": [1] * ROWS,
        "file_name": ["a.jpg"] * ROWS,
        "height": [64] * ROWS,
        "width": [48] * ROWS,
        "box": [[1.5, 2.0, 30.0, 40.0]] * ROWS,
        "objectness": [0.5] * ROWS,
        "concept_ids": [[3, 0]] * ROWS,
        "concept_probs": [[0.75, 0.125]] * ROWS,
        "kept_mass": [0.875] * ROWS,
        "concept": ["cup"] * ROWS,
        "phrase": ["a red cup", None] + ["a red cup"] * (ROWS - 2),
        "caption": [None] * ROWS,
        "key": ["1"] * ROWS,
        "tar": [None] * ROWS,
    }


def mined(folder: Path, **changes: Any) -> Path:
    """Writes a finished folder of one shard, of which one row has other values."""
    table = columns()
    for name, value in changes.items():
        table[name] = [*table[name][:BAD], value, *table[name][BAD + 1 :]]
    pq.write_table(pa.table(table, schema=shards.SCHEMA), shard_path(folder, 0))
    (folder / "manifest.json").write_text(json.dumps({"version": VERSION, "shards": ["shard-00000.parquet"]}))
    save_file({"embeddings": torch.zeros(4, 2)}, folder / "vocabulary.safetensors")
    return folder


BOXES = {
    "NaN": [1.0, math.nan, 3.0, 4.0],
    "null in the box": [1.0, None, 3.0, 4.0],
    "infinite": [1.0, 2.0, math.inf, 4.0],
    "far too large": [1.0, 2.0, 1e30, 4.0],
    "wrong order": [30.0, 2.0, 3.0, 4.0],
}


@pytest.mark.parametrize("box", [*BOXES.values(), None], ids=[*BOXES, "null"])
def test_a_box_that_is_none_is_refused(tmp_path: Path, box: Any) -> None:
    with pytest.raises(InputError, match=rf"shard .*shard-00000\.parquet, row {BAD}: box must be") as caught:
        list(read_regions(mined(tmp_path, box=box)))
    assert "\n" not in str(caught.value)


FAULTS: dict[str, dict[str, Any]] = {
    "outside its image": {"box": [1.0, 2.0, 60.0, 40.0]},
    "left of its image": {"box": [-9.0, 2.0, 30.0, 40.0]},
    "no height": {"height": 0},
    "negative width": {"width": -48},
    "objectness of NaN": {"objectness": math.nan},
    "a logit": {"objectness": 7.5},
    "no objectness": {"objectness": None},
    "no id": {"image_id": None},
    "no name": {"file_name": None},
    "no concept": {"concept": None},
    "concept -1": {"concept_ids": [3, -1]},
    "a concept that the vocabulary lacks": {"concept_ids": [4, 0]},
    "null concept": {"concept_ids": [3, None]},
    "no concepts": {"concept_ids": None},
    "probability of 1.5": {"concept_probs": [1.5, 0.1]},
    "negative probability": {"concept_probs": [0.5, -0.1]},
    "probability of NaN": {"concept_probs": [0.5, math.nan]},
    "fewer probabilities": {"concept_probs": [0.5]},
    "no probabilities": {"concept_probs": []},
    "mass of NaN": {"kept_mass": math.nan},
    "too much mass": {"kept_mass": 3.0},
}


@pytest.mark.parametrize("changes", FAULTS.values(), ids=FAULTS)
def test_a_row_that_no_mining_writes_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (column,) = changes
    with pytest.raises(InputError, match=rf"shard-00000\.parquet, row {BAD}: {column} must be"):
        list(read_regions(mined(tmp_path, **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"box": [0.0, 0.0, 48.0, 64.0]},
        {"box": [3.0, 3.0, 3.0, 3.0]},
        {"objectness": 0.0},
        {"objectness": 1.0},
        {"concept_ids": [], "concept_probs": [], "kept_mass": 0.0},
        {"concept_ids": [2], "concept_probs": [1.0], "kept_mass": 1.0},
        {"phrase": None},
    ],
)
def test_what_mining_may_write_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert len(list(read_regions(mined(tmp_path, **changes)))) == ROWS


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_proposals_are_checked_too(tmp_path: Path, box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: columns()[name] for name in storage.SCHEMA.names}
    table["box"] = [*table["box"][:BAD], box, *table["box"][BAD + 1 :]]
    path = tmp_path / "proposals.parquet"
    pq.write_table(
        pa.table(table, schema=storage.SCHEMA), path, row_group_size=3
    )  # the bad one in the second
    with pytest.raises(InputError, match=rf"proposals file .*proposals\.parquet, row {BAD}: box must be"):
        ProposalTable(path).of_image(1)


def test_boxes_of_doubles_that_floats_cannot_hold_are_refused(tmp_path: Path) -> None:
    box = pa.array([[1.0, 2.0, 1e300, 4.0]], pa.list_(pa.float64(), 4))
    pq.write_table(pa.table({"image_id": [1], "box": box, "objectness": [0.5]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"p\.parquet"):
        ProposalTable(tmp_path / "p.parquet").of_image(1)


def code(height: int, width: int, pixels: Callable[[np.ndarray[Any, Any]], None]) -> dict[str, Any]:
    """Returns a mask's run-length code as COCO's files hold it."""
    drawn = np.zeros((height, width), np.uint8, order="F")
    pixels(drawn)
    found = mask.encode(drawn)
    return {"size": [height, width], "counts": found["counts"].decode()}


def test_run_length_codes_are_read_as_their_library_reads_them() -> None:
    generator = np.random.default_rng(0)
    for height, width in [(1, 1), (7, 5), (300, 200), (40, 1000)]:
        for share in (0.0, 0.02, 0.5, 1.0):

            def draw(pixels: np.ndarray[Any, Any], share: float = share) -> None:
                pixels[generator.random(pixels.shape) < share] = 1

            made = code(height, width, draw)
            runs = runs_of(made["counts"])
            assert sum(runs) == height * width
            assert (
                mask.frPyObjects({"size": made["size"], "counts": runs}, height, width)["counts"]
                == made["counts"].encode()
            )


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [20, 30], "counts": "garbage"},
        {"size": [20, 30], "counts": ""},
        {"size": [20, 30], "counts": "žž"},
        {"size": [20, 30], "counts": "o" * 40},
        {"size": [20, 30], "counts": 7},
        {"size": [2, 3], "counts": [4, -2, 4]},
        {"size": [2, 3], "counts": [4, 4]},
        {"size": [1e300, 3], "counts": [4, 4]},
        {"size": ["a", 3], "counts": [4, 4]},
        {"size": 3, "counts": [4, 4]},
    ],
)
def test_run_length_codes_of_garbage_are_refused(segmentation: dict[str, Any]) -> None:
    entry = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": segmentation}
    with pytest.raises(InputError, match=r"results\[0\] .*run-length code"):
        checked_result(entry, "results[0]")
    whole = code(20, 30, lambda pixels: pixels[2:7, 3:9].fill(1))
    assert checked_result({**entry, "segmentation": whole}, "results[0]")["bbox"] == [3, 2, 6, 5]


def test_a_code_for_another_size_is_refused() -> None:
    whole = code(20, 30, lambda pixels: pixels[2:7, 3:9].fill(1))
    entry = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": {**whole, "size": [20, 31]}}
    with pytest.raises(InputError, match="run-length code"):
        checked_result(entry, "results[0]")


@pytest.mark.parametrize("box", [[0, 0, 1e300, 4], [1e9, 0, 3, 4], [0, -1e8, 3, 4]])
def test_results_with_boxes_of_no_image_are_refused(box: list[float]) -> None:
    with pytest.raises(InputError, match="four finite box numbers"):
        checked_result({"image_id": 1, "category_id": 1, "score": 0.5, "bbox": box}, "results[0]")
