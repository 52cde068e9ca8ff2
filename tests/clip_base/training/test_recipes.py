from __future__ import annotations

from pathlib import Path

import pytest

from clip_base.jobs.config import resolve
from clip_base.models import zoo
from clip_base.training.pretrain import PretrainConfig

FOLDER = Path(__file__).parents[3] / "configs" / "pretrain"
# Learning rates: arXiv 2103.00020, tables 19 and 20.
RATES = {
    "RN50": 5e-4,
    "RN101": 5e-4,
    "RN50x4": 5e-4,
    "RN50x16": 4e-4,
    "RN50x64": 3.6e-4,
    "ViT-B/32": 5e-4,
    "ViT-B/16": 5e-4,
    "ViT-L/14": 4e-4,
    "ViT-L/14@336px": 2e-5,
}


def recipe(name: str) -> PretrainConfig:
    file = FOLDER / f"{name.lower().replace('/', '-').replace('@', '-')}.yaml"
    return resolve(PretrainConfig, file, ["out=x", "source.name=webdataset", "source.shards=a.tar"])


def test_every_published_tower_has_a_recipe() -> None:
    assert list(RATES) == zoo.available_models()


@pytest.mark.parametrize("name", list(RATES))
def test_a_recipe_is_the_published_one(name: str) -> None:
    config = recipe(name)
    train = config.train
    assert config.model == name
    assert train.lr == RATES[name]
    is_vit = name.startswith("ViT")
    assert (train.beta1, train.beta2, train.eps) == ((0.9, 0.98, 1e-6) if is_vit else (0.9, 0.999, 1e-8))
    assert (train.batch_size, train.weight_decay, train.warmup_steps) == (32768, 0.2, 2000)
    assert (train.steps, train.epochs) == (0, 1 if name.endswith("336px") else 32)
    assert (train.optimizer, train.schedule, train.checkpointing) == ("adamw", "cosine", True)
    # A square as large as the image allows at a random place, and every other text is a negative.
    assert (config.crop, config.objective["name"]) == (1.0, "chunked")
    assert config.init == ("ViT-L/14" if name.endswith("336px") else "")


def test_a_recipe_begins_with_the_command_to_run() -> None:
    for name in RATES:
        path = FOLDER / f"{name.lower().replace('/', '-').replace('@', '-')}.yaml"
        comment = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
        assert f"clip-base pretrain configs/pretrain/{path.name} " in comment
