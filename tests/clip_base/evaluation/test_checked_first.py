"""What a job reads is checked before it embeds or trains anything; a finished training is measured again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from clip_base.evaluation.features import Embedder
from clip_base.jobs import cli
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.training import pretrain
from clip_base.weights.native import save_clip

TINY = """
tower:
  embed_dim: 16
  vision: {kind: vit, layers: [1], width: 32, patch: 16, resolution: 32, head_width: 16}
  text: {width: 32, heads: 2, layers: 1, context_length: 12}
train: {steps: 2, batch_size: 6, lr: 1.0e-3, precision: fp32}
"""


def no_work(*_: object, **__: object) -> None:
    raise AssertionError("work began before everything was checked")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    text = TextConfig(width=64, heads=1, layers=1, context_length=12)
    save_clip(CLIP(CLIPConfig(16, vision, text)), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.fixture
def classes(pictures: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "classes"
    for number, file in enumerate(sorted(pictures.glob("*.png"))[:4]):
        place = folder / f"class {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return folder


@pytest.fixture
def training(pictures: Path, tmp_path: Path) -> list[str]:
    rows = [f"{index}.png,image number {index}" for index in range(12)]
    (pictures / "table.csv").write_text("\n".join(["image,caption", *rows]))
    (tmp_path / "tiny.yaml").write_text(TINY)
    source = ["source.name=csv", f"source.file={pictures / 'table.csv'}"]
    return ["pretrain", str(tmp_path / "tiny.yaml"), *source, f"out={tmp_path / 'out'}"]


def test_a_probe_reads_both_parts_before_it_embeds_one(
    weights: Path,
    classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Embedder, "__call__", no_work)
    parts = [f"train={classes}", f"test={tmp_path / 'absent'}"]
    assert cli.main(["linear-probe", *parts, f"weights={weights}", f"out={tmp_path / 'out'}"]) == 2
    assert "absent does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["zeroshot", "classify"])
def test_names_that_are_too_long_are_told_before_images_are_embedded(
    job: str,
    weights: Path,
    classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Embedder, "__call__", no_work)
    long = " ".join(["word"] * 40)
    names = {
        "zeroshot": [f"images={classes}", f"names=[{long},b]"],
        "classify": [str(classes), f"classes={long},b"],
    }[job]
    options = [f"weights={weights}", "templates=simple", f"out={tmp_path / 'out'}"]
    assert cli.main([job, *names, *options]) == 2
    assert "tokens" in capsys.readouterr().err


def test_a_validation_whose_images_are_missing_ends_the_training_before_its_first_step(
    training: list[str],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pretrain, "fit", no_work)
    (tmp_path / "empty").mkdir()
    wrong = [f"evaluate.source.file={pictures / 'table.csv'}", f"evaluate.source.images={tmp_path / 'empty'}"]
    assert cli.main([*training, "evaluate.source.name=csv", *wrong]) == 1
    assert "evaluate.source: 12 of 12 images are missing" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(training) == 0  # the folder was not locked by the call that failed


def test_a_finished_training_is_measured_on_another_validation_and_not_trained_again(
    training: list[str], classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metrics() -> dict[str, float]:
        found: dict[str, float] = json.loads((tmp_path / "out" / "metrics.json").read_text())
        return found

    assert cli.main(training) == 0
    assert not any(name.startswith("val_") for name in metrics())
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(pretrain, "fit", no_work)
    measured = [*training, f"evaluate.images={classes}"]
    assert cli.main(measured) == 0
    first = metrics()
    model = pretrain.load_clip(tmp_path / "out" / "model.safetensors")
    config = pretrain.ValidationConfig(images=str(classes))
    with torch.no_grad():
        assert first["val_zeroshot_top1"] == pretrain.Validation(config, model)(2)["val_zeroshot_top1"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    monkeypatch.setattr(pretrain, "_measured", no_work)
    assert cli.main(measured) == 0  # the same again: nothing is done
    assert metrics() == first


def test_a_training_with_a_validation_keeps_its_figures_in_the_metrics(
    training: list[str], classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([*training, f"evaluate.images={classes}"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert metrics["val_zeroshot_top1"] == log[-1]["val_zeroshot_top1"]
    monkeypatch.setattr(pretrain, "_measured", no_work)
    assert cli.main([*training, f"evaluate.images={classes}"]) == 0
