"""One bad image never ends a job: whatever is wrong with it or its name, it is one counted skip.

Covered: pretrain (sources coco and jsonl), retrieval, zero-shot, mine, propose, evaluate, detect, features.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from clip_base.jobs.cli import main
from clip_base.storage.files import read_json

NAMES = ["a\0b.png", "\ud800.png", "x" * 300 + ".png", "qoi.png", "gone.png"]
READABLE = 8
TOWER = [
    "model=",
    "tower.vision.layers=[1,1,1,1]",
    "tower.vision.width=8",
    "tower.vision.resolution=32",
    "tower.text.width=32",
    "tower.text.heads=1",
    "tower.text.layers=1",
    "train.steps=6",
    "train.batch_size=4",
    "train.max_skipped=0.6",
    "train.precision=fp32",
]
GRID = ["proposer.name=grid", "proposer.sizes=[1.0]", "resize.short=[64]", "resize.long=64"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight good images among five bad ones; one caption ends in half a surrogate pair."""
    (tmp_path / "images").mkdir()
    good = [f"{number}.png" for number in range(READABLE)]
    for number, name in enumerate(good):
        Image.new("RGB", (64, 64), (number * 30, 9, 9)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "qoi.png").write_bytes(b"qoif\0\0\0\2\0\0\0\2\3\0")
    names = good + NAMES
    captions = ["a red cup \ud83d" if number == 2 else "a red cup" for number in range(len(names))]
    sizes = {"height": 64, "width": 64}
    content = {
        "images": [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names, 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "caption": text, "bbox": [4, 4, 30, 30]}
            for i, text in enumerate(captions, 1)
        ],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    pairs = zip(names, captions, strict=True)
    lines = (json.dumps({"image": f"images/{name}", "caption": text}) + "\n" for name, text in pairs)
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    concept = {"concept": "cup", "count": 3, "examples": [], "kind": "given"}
    (tmp_path / "pool.jsonl").write_text(json.dumps(concept) + "\n")
    return tmp_path


def options(job: str, data: Path, clip_file: Path) -> list[str]:
    coco, images, weights = data / "coco.json", f"images={data / 'images'}", f"weights={clip_file}"
    matcher = ["matcher.name=caption", "matcher.min_probability=0.0"]
    given = {
        "pretrain": [
            "source.name=coco",
            f"source.captions={coco}",
            f"source.images={data / 'images'}",
            *TOWER,
        ],
        "pretrain jsonl": ["source.name=jsonl", f"source.file={data / 'pairs.jsonl'}", *TOWER],
        "retrieval": [f"captions={coco}", images, weights],
        "zeroshot": [f"annotations={coco}", images, weights, "templates=simple"],
        "region-mine": [
            f"captions={coco}",
            images,
            weights,
            f"concepts={data / 'pool.jsonl'}",
            *matcher,
            *GRID,
        ],
        "region-propose": [f"annotations={coco}", images, *GRID],
        "region-evaluate": [f"annotations={coco}", images, weights, "boxes=truth", "report=false"],
        "region-detect": [str(data / "images"), weights, "vocabulary=cup", *GRID[:2], "draw=false"],
        "region-features": [str(data / "images"), weights, *GRID[:2]],
    }[job]
    return given if job.startswith("pretrain") else [*given, "max_skipped=0.6"]


@pytest.mark.parametrize(
    "job",
    [
        "pretrain",
        "pretrain jsonl",
        "retrieval",
        "zeroshot",
        "region-mine",
        "region-propose",
        "region-evaluate",
        "region-detect",
        "region-features",
    ],
)
def test_bad_images_are_counted_skips(job: str, data: Path, clip_file: Path) -> None:
    out = data / "out"
    assert main([job.split()[0], *options(job, data, clip_file), f"out={out}"]) == 0
    entries = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert any("no known format" in entry["reason"] for entry in entries)
    if job in ("region-detect", "region-features"):
        assert len(entries) == 1  # a folder cannot hold the others
    elif job in ("region-evaluate", "region-propose"):
        assert len(entries) == 1  # files that are not there are missing
        assert read_json(out / "metrics.json")["images"] == READABLE
    else:
        assert len(entries) == len(NAMES)
