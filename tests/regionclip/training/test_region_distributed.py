"""Region pretraining in two processes is that of one with the union of their batches."""

from __future__ import annotations

import collections
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.jobs import cli
from clip_base.models.clip import CLIP
from clip_base.weights.native import read_weights, save_clip
from regionclip.mining.shards import read_regions

Launch = Callable[[list[list[str]]], list[subprocess.CompletedProcess[str]]]

# Plain SGD without momentum: weights move by their gradients.
OPTIONS = [
    "resize.short=[64]",
    "resize.long=64",
    "train.steps=2",
    "train.lr=0.002",
    "train.batch_size=4",
    "train.beta1=0",
    "train.weight_decay=0",
    "train.max_grad_norm=0",
    "train.schedule=constant",
    "train.precision=fp32",
    "train.log_every=1",
    "train.save_every=0",
]
SIGMOID = ["region_text.name=sigmoid", "region_text.scale=5", "region_text.bias=-1"]
SELF = [
    "distillation=0",
    "contrastive=0",
    "image_text=0",
    "crop_distillation=1",
    "max_grid=4",
    "freeze_stages=0",
]
RUNS = {
    "published": [],
    "sigmoid": ["memory=30", *SIGMOID, "crop_distillation=1"],
    "texts": ["distillation=0", "train_text=true", "learn_temperature=true", "memory=10"],
    "self": SELF,
}


@pytest.fixture(scope="module")
def mined_unevenly(mining_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, mined with a matcher that keeps more regions of one image than of another."""
    folder = tmp_path_factory.mktemp("mining") / "mined"
    choosy = ["matcher.min_probability=0.5", "matcher.min_phrase=0.0"]
    assert cli.main(["region-mine", *mining_options, *choosy, f"out={folder}"]) == 0
    counts = collections.Counter(region.image_id for region in read_regions(folder))
    assert len(set(counts.values())) > 4
    return folder


@pytest.fixture(scope="module")
def outs(
    mined_unevenly: Path,
    world: Path,
    clip_file: Path,
    make_clip: Callable[..., CLIP],
    launch: Launch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with `one/NAME` and `two/NAME`: each run made by one process and by two.

    Two images of twelve have no caption.
    """
    folder = tmp_path_factory.mktemp("runs")
    save_clip(make_clip("vit"), folder / "vit.safetensors")
    captions = json.loads((world / "captions_train.json").read_text())
    silent = {image["id"] for image in captions["images"][:2]}
    captions["annotations"] = [one for one in captions["annotations"] if one["image_id"] not in silent]
    (folder / "captions.json").write_text(json.dumps(captions))
    shards = [f"mined={mined_unevenly}", f"captions={folder / 'captions.json'}", f"weights={clip_file}"]
    pictures = [f"images={world / 'images'}", f"weights={folder / 'vit.safetensors'}"]
    commands = {
        name: ["region-pretrain", *(pictures if name == "self" else shards), *OPTIONS, *extra]
        for name, extra in RUNS.items()
    }
    for name, command in commands.items():
        assert cli.main([*command, f"out={folder / 'one' / name}"]) == 0
    ended = launch([[*command, f"out={folder / 'two' / name}"] for name, command in commands.items()])
    assert [process.returncode for process in ended] == [0, 0], "".join(one.stderr for one in ended)
    return folder


def log_of(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def weights_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    return read_weights(out / "checkpoints" / f"{step:08d}" / "model.safetensors")[0]


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_have_the_losses_and_gradients_of_one(outs: Path, name: str) -> None:
    one, two = outs / "one" / name, outs / "two" / name
    expected = log_of(one)
    assert len(expected) == 2
    for found, wanted in zip(log_of(two), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    before, after, other = weights_of(one, 1), weights_of(one, 2), weights_of(two, 2)
    assert after.keys() == other.keys()
    for root in {key.split(".")[1] for key in after if after[key].is_floating_point()}:
        keys = [key for key in after if key.split(".")[1] == root and after[key].is_floating_point()]
        moved = torch.cat([(after[key] - before[key]).flatten() for key in keys]).norm()
        apart = torch.cat([(after[key] - other[key]).flatten() for key in keys]).norm()
        assert float(apart) <= 0.01 * float(moved), root
