"""Region pretraining moves what it may move, learns, and leaves the text tower as it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.checkpoint import read_weights
from clip_base.cli import main_regionclip
from clip_base.errors import InputError
from clip_base.files import read_json
from clip_base.models.clip import CLIP
from clip_base.tokenizer import Tokenizer
from clip_base.train import TrainConfig
from clip_base.weights.native import load_clip, save_clip
from regionclip.pretrain import RegionPretrainConfig, RegionTextTask, freeze, mined_samples
from regionclip.samples import RegionSamples
from regionclip.shards import read_regions
from regionclip.structures import RegionBatch, Regions
from regionclip.transforms import ResizeConfig
from regionclip.vocabulary import Vocabulary

MakeClip = Callable[..., CLIP]
Command = Callable[..., tuple[int, str]]

OPTIONS = [
    "resize.short=[64]",
    "resize.long=64",
    "regions=6",
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


def config(**options: object) -> RegionPretrainConfig:
    return RegionPretrainConfig("mined", "weights", out="out", **options)  # type: ignore[arg-type]


def batch_of(mined: Path, context: int = 24) -> RegionBatch:
    samples = mined_samples(str(mined), "", "")
    data = RegionSamples(samples, ResizeConfig([64], 64, False), 6, Tokenizer(context))
    return data.collate([data.item(index, torch.Generator().manual_seed(0)) for index in range(4)])


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


@pytest.mark.parametrize("stages", range(5))
def test_freezing_takes_the_first_stages_only(make_clip: MakeClip, stages: int) -> None:
    visual = make_clip().visual
    freeze(visual, stages, batch_norm=False)
    order = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for place, name in enumerate(order):
        wanted = place >= stages
        assert all(p.requires_grad == wanted for p in getattr(visual, name).parameters()), name
    assert all(p.requires_grad for p in visual.attnpool.parameters())


def test_free_batch_norms_do_move(mined: Path, make_clip: MakeClip) -> None:
    model, vocabulary = make_clip(), Vocabulary.load(mined / "vocabulary.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task = RegionTextTask(model, vocabulary, config(freeze_stages=0, freeze_batch_norm=False)).train()
    sum(task(batch_of(mined)).values()).backward()  # type: ignore[union-attr]
    assert not torch.equal(model.state_dict()["visual.bn1.running_mean"], before["visual.bn1.running_mean"])
    assert model.visual.conv1.weight.grad is not None  # type: ignore[union-attr]


def test_stages_that_do_not_exist_are_refused(make_clip: MakeClip) -> None:
    with pytest.raises(InputError, match="0 to 4, found 5"):
        freeze(make_clip().visual, 5, batch_norm=True)
    with pytest.raises(InputError, match="set it to 0 for a ViT"):
        freeze(make_clip("vit").visual, 2, batch_norm=True)


def test_only_losses_with_a_weight_are_made(mined: Path, make_clip: MakeClip) -> None:
    vocabulary, batch = Vocabulary.load(mined / "vocabulary.safetensors"), batch_of(mined)
    everything = RegionTextTask(make_clip(), vocabulary, config())(batch)
    assert set(everything) == {"distillation", "region_text", "image_text"}
    doubled = RegionTextTask(make_clip(), vocabulary, config(distillation=2.0, contrastive=0.0))(batch)
    assert set(doubled) == {"distillation", "image_text"}
    torch.testing.assert_close(doubled["distillation"], 2 * everything["distillation"])
    torch.testing.assert_close(doubled["image_text"], everything["image_text"])
    with pytest.raises(InputError, match="all three losses have weight 0"):
        config(distillation=0, contrastive=0, image_text=0)


def test_a_vit_is_trained_through_its_dense_map(mined: Path, make_clip: MakeClip) -> None:
    vocabulary = Vocabulary.load(mined / "vocabulary.safetensors")
    model = make_clip("vit")
    losses = RegionTextTask(model, vocabulary, config(freeze_stages=0)).train()(batch_of(mined))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert model.visual.conv1.weight.grad is not None  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in model.text.parameters())


def test_a_batch_without_regions_can_be_trained_on(mined: Path, make_clip: MakeClip) -> None:
    full = batch_of(mined)
    none = Regions(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        concept_ids=torch.zeros(0, 3, dtype=torch.int64),
        concept_probs=torch.zeros(0, 3),
    )
    vocabulary = Vocabulary.load(mined / "vocabulary.safetensors")
    losses = RegionTextTask(make_clip(), vocabulary, config()).train()(
        dataclasses.replace(full, regions=none)
    )
    assert float(losses["distillation"].detach()) == float(losses["region_text"].detach()) == 0
    sum(losses.values()).backward()  # type: ignore[union-attr]


def test_samples_hold_what_the_shards_say(mined: Path) -> None:
    samples, rows = mined_samples(str(mined), "", ""), list(read_regions(mined))
    boxes = torch.cat([sample.boxes for sample in samples])
    torch.testing.assert_close(boxes, torch.tensor([row.box for row in rows]))
    first = [int(ids[0]) for sample in samples for ids in sample.concept_ids]  # type: ignore[union-attr]
    assert first == [row.concept_ids[0] for row in rows]
    assert all(sample.captions for sample in samples)


def test_a_student_of_another_width_is_refused(
    mined: Path, make_clip: MakeClip, tmp_path: Path, regionclip: Command
) -> None:
    save_clip(make_clip(embed_dim=48), tmp_path / "wide.safetensors")
    code, told = regionclip(
        "pretrain",
        f"mined={mined}",
        f"weights={tmp_path / 'wide.safetensors'}",
        f"out={tmp_path / 'out'}",
        *OPTIONS,
    )
    assert code == 2
    assert "embeddings of 32 numbers, the model of 48" in told


def test_the_result_loads_as_a_clip(trained: Path) -> None:
    assert load_clip(trained / "model.safetensors").config.embed_dim == 32


def test_the_defaults_are_the_published_recipe() -> None:
    published = config()
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
