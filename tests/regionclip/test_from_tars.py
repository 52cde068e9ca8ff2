"""The whole path from webdataset tars alone gives the figures of the same data as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs.cli import main, main_regionclip
from clip_base.storage.files import read_json
from clip_base.storage.hashing import file_hash

SCENES = ["images=24", "val_images=8", "size=64", "object_min=0.3", "seed=5", "workers=1"]
SIZES = ["resize.short=[64]", "resize.long=64"]


def walk(
    folder: Path, models: list[Path], images: dict[str, str], captions: list[str], made: list[str]
) -> None:
    """Runs every job; `images` of "train" and "val", `captions` of `concepts` and of `mine`."""

    def regionclip(job: str, *options: object) -> None:
        assert main_regionclip([job, *map(str, options)]) == 0, job

    (clip, rpn), world = models, folder / "world"
    assert main(["scenes", f"out={world}", *SCENES, *made]) == 0
    pool = folder / "concepts.jsonl"
    regionclip("concepts", captions[0], "min_count=2", f"out={pool}")
    train, val = f"images={images['train']}", f"images={images['val']}"
    matching = ["matcher.name=caption", "matcher.min_probability=0", "proposer.name=grid"]
    common = [f"weights={clip}", f"concepts={pool}", f"out={folder / 'mined'}", "precision=fp32"]
    regionclip("mine", train, *captions[1:], *common, *matching, *SIZES, "batch_size=4")
    truth = f"annotations={world}/instances_train.json"
    regionclip("report", f"mined={folder / 'mined'}", truth, f"out={folder / 'report'}")
    training = ["train.steps=3", "train.batch_size=4", "train.precision=fp32", "train.lr=0.01"]
    start = [f"mined={folder / 'mined'}", f"weights={clip}", f"out={folder / 'pretrained'}"]
    regionclip("pretrain", *start, *training, *SIZES)
    weights = f"weights={folder / 'pretrained' / 'model.safetensors'}"
    detector = [truth, train, weights, f"split={world}/split.json", f"out={folder / 'detector'}"]
    network = [f"rpn={rpn}", "max_proposals=30", "rois_per_image=16", "detector.max_proposals=20"]
    regionclip("train-detector", *detector, *training, *SIZES, *network)
    measured = [f"annotations={world}/instances_val.json", val, f"split={world}/split.json"]
    found = f"weights={folder / 'detector' / 'model.safetensors'}"
    regionclip("evaluate", *measured, found, "boxes=truth", f"out={folder / 'evaluation'}", *SIZES)
    regionclip("export", f"mined={folder / 'mined'}", f"out={folder / 'pseudo.json'}")


def figures(folder: Path) -> dict[str, Any]:
    found = {"concepts": file_hash(folder / "concepts.jsonl")}
    found["pretrained"] = file_hash(folder / "pretrained" / "model.safetensors")
    for job in ("report", "evaluation"):
        found[job] = read_json(folder / job / "metrics.json")
    found["boxes"] = [entry["bbox"] for entry in read_json(folder / "pseudo.json")["annotations"]]
    return found


@pytest.mark.slow
def test_tars_alone_give_the_folders_figures(tmp_path: Path, clip_file: Path, rpn_file: Path) -> None:
    one, two = tmp_path / "folder", tmp_path / "tars"
    captions = f"captions={one}/world/captions_train.json"
    places = dict.fromkeys(("train", "val"), f"{one}/world/images")
    walk(one, [clip_file, rpn_file], places, [captions, captions], [])
    tars = {split: f"{two}/world/{split}-*.tar" for split in ("train", "val")}
    made = ["format=webdataset", "tar_images=10"]
    walk(two, [clip_file, rpn_file], tars, [f"captions={tars['train']}"], made)
    assert not (two / "world" / "images").exists()
    assert figures(one) == figures(two)
    assert figures(one)["report"]["regions"] > 100
