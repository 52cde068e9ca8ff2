"""Region pretraining moves what it may move, learns, and leaves the text tower as it was."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_base.jobs.cli import main_regionclip
from clip_base.jobs.config import resolve
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.models.resnet import ModifiedResNet
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.training.loop import TrainConfig
from clip_base.weights.native import load_clip, read_weights, save_clip
from regionclip.mining.shards import read_regions
from regionclip.models.region_encoder import RegionEncoder
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.mined import MinedSamples
from regionclip.training.region_text import RegionPretrainConfig
from regionclip.training.samples import GridPatchDataset, Sample

MakeClip = Callable[..., CLIP]
Command = Callable[..., tuple[int, str]]

CONFIGS = Path(__file__).parents[3] / "configs" / "region-pretrain"
OPTIONS = [
    "resize.short=[64]",
    "resize.long=64",
    "max_regions=6",
    "train.steps=12",
    "train.batch_size=6",
    "train.optimizer=adamw",
    "train.lr=0.002",
    "train.weight_decay=0.1",
    "train.schedule=constant",
    "train.milestones=[]",
    "train.precision=fp32",
    "train.log_every=1",
]


@pytest.fixture(scope="module")
def trained(mined: Path, clip_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with the published freezing: stem, layer1 and batch norms stay."""
    out = tmp_path_factory.mktemp("pretraining") / "out"
    command = ["pretrain", f"mined={mined}", f"weights={clip_file}", f"out={out}", *OPTIONS]
    assert main_regionclip(command) == 0
    return out


def test_frozen_stages_batch_norms_and_the_text_tower_do_not_move(trained: Path, clip_file: Path) -> None:
    before, after = read_weights(clip_file)[0], read_weights(trained / "model.safetensors")[0]
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    allowed = tuple(f"visual.{name}." for name in ("layer2", "layer3", "layer4", "attnpool"))
    assert all(key.startswith(allowed) for key in moved), sorted(moved)
    assert not any("bn" in key or "downsample.1" in key for key in moved)
    assert "visual.layer2.0.conv1.weight" in moved
    assert "visual.attnpool.c_proj.weight" in moved


def test_the_loss_falls(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    totals = [sum(line[name] for name in ("distillation", "region_text", "image_text")) for line in lines]
    assert len(totals) == 12
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])


def test_metrics_count_what_was_trained_on(trained: Path, mined: Path) -> None:
    metrics, rows = read_json(trained / "metrics.json"), list(read_regions(mined))
    assert metrics["steps"] == 12
    assert metrics["regions"] == len(rows)
    assert metrics["images"] == len({row.image_id for row in rows})


WRONG = [
    ({"distillation": 0, "contrastive": 0, "image_text": 0}, "all losses have weight 0"),
    (
        {"mined": ""},
        "give mined=, what `regionclip mine` made, or images= with crop_distillation as the only loss",
    ),
    ({"train_text": True}, "set distillation=0 or train_text=false"),
    (
        {"train_text": True, "distillation": 0, "contrastive": 0, "image_text": 0, "crop_distillation": 1},
        "train_text needs a loss that reads texts",
    ),
    (
        {"learn_temperature": True, "distillation": 0, "image_text": 0, "region_text": {"name": "sigmoid"}},
        "learn_temperature needs a loss with a temperature",
    ),
    ({"memory": 8, "contrastive": 0}, "give contrastive a weight or set memory=0"),
    ({"teacher": "clip", "distillation": 0}, "give distillation a weight or leave teacher empty"),
    ({"memory": -1}, "found -1, 0, 0, 0 and 6"),
    ({"max_grid": 0}, "max_grid at least 1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RegionPretrainConfig(**{"mined": "mined", "weights": "weights", "out": "out", **options})


def test_a_teacher_that_did_not_mine_is_refused(
    mined: Path, clip_file: Path, make_clip: MakeClip, tmp_path: Path, regionclip: Command
) -> None:
    save_clip(make_clip(seed=9), tmp_path / "other.safetensors")
    command = ["pretrain", f"mined={mined}", f"weights={clip_file}", *OPTIONS, f"out={tmp_path / 'out'}"]
    code, told = regionclip(*command, f"teacher={tmp_path / 'other.safetensors'}")
    assert code == 2
    assert "other.safetensors is not the file used for mining" in told


def resumed(out: Path, command: list[str]) -> None:
    """Takes away what the last step of a run left, and runs it again."""
    shutil.rmtree(max((out / "checkpoints").glob("[0-9]*")))
    (out / "metrics.json").unlink()
    (out / "model.safetensors").unlink()
    assert main_regionclip(command) == 0


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_a_resumed_run_goes_on_with_its_memory_and_bias(
    name: str, mined: Path, clip_file: Path, tmp_path: Path
) -> None:
    more = ["memory=40", f"region_text.name={name}", "train.steps=4", "train.save_every=0"]
    command = [
        "pretrain",
        f"mined={mined}",
        f"weights={clip_file}",
        *OPTIONS,
        *more,
        f"out={tmp_path / 'out'}",
    ]
    assert main_regionclip(command) == 0
    undisturbed, _ = read_weights(tmp_path / "out" / "model.safetensors")
    state, _ = read_weights(tmp_path / "out" / "checkpoints" / "00000004" / "model.safetensors")
    assert int((state["memory.concepts"] >= 0).sum()) == 40
    assert ("region_text.bias" in state) == (name == "sigmoid")
    resumed(tmp_path / "out", command)
    again, _ = read_weights(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in undisturbed.items())


def test_the_learning_rate_is_scaled_to_the_batch_and_said(
    mined: Path, clip_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["pretrain", f"mined={mined}", f"weights={clip_file}", *OPTIONS, "train.steps=1", f"out={out}"]
    assert main_regionclip([*command, "lr_reference_batch_size=96"]) == 0
    assert "learning rate 0.000125: 0.002 is for a batch of 96, this one is 6" in capsys.readouterr().out
    assert json.loads((out / "log.jsonl").read_text())["lr"] == pytest.approx(0.000125)


@pytest.mark.parametrize("name", ["rn50", "rn50x4"])
def test_the_published_recipes_are_the_defaults_for_a_batch_of_96(name: str) -> None:
    given = ["mined=m", "weights=w", "out=o"]
    recipe = resolve(RegionPretrainConfig, CONFIGS / f"{name}.yaml", given)
    assert recipe.lr_reference_batch_size == recipe.train.batch_size == 96
    assert recipe.temperature == 0.01
    expected = resolve(RegionPretrainConfig, None, [*given, "lr_reference_batch_size=96", "temperature=0.01"])
    expected.train = dataclasses.replace(expected.train, warmup_steps=1000, workers=recipe.train.workers)
    assert recipe == expected


def test_regions_of_the_published_towers_are_as_large_as_published() -> None:
    sides = {}
    for name in ("RN50", "RN50x4"):
        sizes = zoo.config(name)
        with torch.device("meta"):
            visual = ModifiedResNet(sizes.vision, sizes.embed_dim)
        sides[name] = visual.region_size
    assert sides == {"RN50": 14, "RN50x4": 18}


SELF = [
    "distillation=0",
    "contrastive=0",
    "image_text=0",
    "crop_distillation=1",
    "freeze_stages=0",
    "max_grid=3",
]


def test_a_vits_dense_map_comes_to_agree_with_its_crops(
    world: Path, make_clip: MakeClip, tmp_path: Path
) -> None:
    save_clip(make_clip("vit"), tmp_path / "vit.safetensors")
    command = ["pretrain", f"images={world / 'images'}", f"weights={tmp_path / 'vit.safetensors'}"]
    assert main_regionclip([*command, *OPTIONS, *SELF, "train.steps=30", f"out={tmp_path / 'out'}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    first, last = (sum(line["crops"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < 0.5 * first
    before, after = (load_clip(tmp_path / name) for name in ("vit.safetensors", "out/model.safetensors"))
    data = GridPatchDataset(
        [Sample(path, torch.zeros(0, 4)) for path in sorted((world / "images").rglob("*.jpg"))],
        3,
        TrainingResizeConfig([64], 64, flip=False),
    )
    batch = data.collate([data.item(index, torch.Generator().manual_seed(9)) for index in range(8)])
    with torch.no_grad():
        target = RegionEncoder(before.visual, "crop", 1.0)(batch.images, batch.regions)
        cosines = [
            float((RegionEncoder(model.visual, "dense")(batch.images, batch.regions) * target).sum(1).mean())
            for model in (before, after)
        ]
    assert cosines[1] > cosines[0] + 0.1


def test_a_folder_without_pictures_is_named(make_clip: MakeClip, tmp_path: Path, regionclip: Command) -> None:
    save_clip(make_clip("vit"), tmp_path / "vit.safetensors")
    (tmp_path / "empty").mkdir()
    command = ["pretrain", f"images={tmp_path / 'empty'}", f"weights={tmp_path / 'vit.safetensors'}"]
    code, told = regionclip(*command, *SELF, *OPTIONS, f"out={tmp_path / 'out'}")
    assert code == 2
    assert "empty holds no images" in told


def test_samples_hold_what_the_shards_say(mined: Path, tmp_path: Path) -> None:
    samples, rows = MinedSamples(mined, tmp_path / "cache"), list(read_regions(mined))
    boxes = torch.cat([sample.boxes for sample in samples])
    torch.testing.assert_close(boxes, torch.tensor([row.box for row in rows]))
    first = [int(ids[0]) for sample in samples for ids in sample.concept_ids]  # type: ignore[union-attr]
    assert first == [row.concept_ids[0] for row in rows]
    assert all(sample.captions for sample in samples)


def test_a_new_projection_that_would_stay_as_it_begins_is_refused(
    mined: Path, make_clip: MakeClip, tmp_path: Path, regionclip: Command
) -> None:
    save_clip(make_clip(embed_dim=48), tmp_path / "wide.safetensors")
    code, told = regionclip(
        "pretrain",
        f"mined={mined}",
        f"weights={tmp_path / 'wide.safetensors'}",
        f"out={tmp_path / 'out'}",
        *OPTIONS,
        "text_embeddings=teacher",
        "image_text=0",
        "freeze_stages=5",
    )
    assert code == 2
    assert "embeddings have 32 numbers, the student's 48" in told


def test_the_result_loads_as_a_clip(trained: Path) -> None:
    assert load_clip(trained / "model.safetensors").config.embed_dim == 32


def test_the_defaults_are_the_published_recipe() -> None:
    published = RegionPretrainConfig(mined="mined", weights="weights", out="out")
    assert (published.distillation, published.contrastive, published.image_text) == (1, 1, 1)
    assert (published.freeze_stages, published.freeze_batch_norm) == (2, True)
    assert published.train == TrainConfig(
        steps=600_000,
        batch_size=96,
        optimizer="sgd",
        lr=0.002,
        weight_decay=1e-4,
        schedule="step",
        milestones=[0.5, 0.875],
        max_grad_norm=5.0,
    )


def test_a_loss_that_is_no_number_names_the_images_of_its_batch(
    mined: Path, clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    command = ["pretrain", f"mined={mined}", f"weights={clip_file}", *OPTIONS, f"out={tmp_path / 'out'}"]
    code, told = regionclip(*command, "train.lr=1e38")
    assert code == 2
    assert "the loss is not finite at step 2" in told
    assert ".jpg" in told
