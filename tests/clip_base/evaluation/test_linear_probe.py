from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clip_base.evaluation import linear_probe as job
from clip_base.evaluation.linear_probe import Fits, LabeledFeatures, LinearProbeConfig, linear_probe
from clip_base.jobs import cli
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.vit import VisionTransformer
from clip_base.runtime.errors import InputError
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip

COLORS = {"blue": (20, 40, 230), "green": (30, 200, 40), "red": (220, 30, 20)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    model = CLIP(CLIPConfig(16, vision, TextConfig(width=64, heads=1, layers=1, context_length=20)))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_clip(model, path)
    return str(path)


def folder(root: Path, count: int, seed: int) -> str:
    chance = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(np.array(color) + chance.integers(-90, 90, (40, 50, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return str(root)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    return {"train": folder(tmp_path / "train", 6, 0), "test": folder(tmp_path / "test", 3, 1)}


def run(weights: str, out: Path, **options: Any) -> dict[str, Any]:
    linear_probe(LinearProbeConfig(weights=weights, out=str(out), precision="fp32", **options))
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def clusters(count: int, seed: int, spread: float = 0.5, classes: int = 3) -> LabeledFeatures:
    chance = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, 8))
    labels = np.arange(classes).repeat(count)
    features = centers[labels] + spread * chance.normal(size=(len(labels), 8))
    return LabeledFeatures(features.astype(np.float32), labels.astype(np.int64))


def test_the_probe_learns_colors_and_leaves_its_tables(
    weights: str, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(folders["test"]) / "red" / "bad.png").write_bytes(b"broken")
    metrics = run(weights, tmp_path / "out", **folders, shots=[1, 2], seeds=2)
    assert metrics["top1"] == 1.0
    assert (metrics["images"], metrics["train_images"], metrics["skipped"], metrics["classes"]) == (
        9,
        18,
        1,
        3,
    )
    assert set(metrics["few_shot"]) == {"1", "2"}
    rows = list(csv.DictReader((tmp_path / "out/few_shot.csv").open()))
    assert [(row["shots"], row["draw"], row["images"]) for row in rows] == [
        ("1", "0", "3"),
        ("1", "1", "3"),
        ("2", "0", "6"),
        ("2", "1", "6"),
    ]
    table = list(csv.DictReader((tmp_path / "out/per_class.csv").open()))
    assert [(row["name"], row["images"], row["top1"]) for row in table] == [
        (name, "3", "1.0") for name in COLORS
    ]
    assert "few-shot probes" in capsys.readouterr().out
    again = run(
        weights, tmp_path / "again", **folders, shots=[1, 2], seeds=2, features=str(tmp_path / "out/features")
    )
    assert again == metrics


def test_the_features_are_those_before_the_projection(
    weights: str, folders: dict[str, str], tmp_path: Path
) -> None:
    for layer, size in (("penultimate", 64), ("embedding", 16)):
        run(weights, tmp_path / layer, **folders, layer=layer)
        kept = [load_file(path) for path in (tmp_path / layer / "features").glob("*.safetensors")]
        shapes = {tuple(table.shape) for tables in kept for table in tables.values() if table.ndim == 2}
        assert shapes == {(18, size), (9, size)}
    visual = load_clip(weights).visual
    assert isinstance(visual, VisionTransformer)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(visual.pooled(pixels) @ visual.proj, visual(pixels))


def test_the_fit_minimizes_sklearns_published_objective() -> None:
    data = clusters(20, 0, spread=2.0)
    model = job.fit(data, 0.1, Fits())
    features = torch.from_numpy(data.features).double()
    weight = torch.from_numpy(model.coef_).double().requires_grad_()
    bias = torch.from_numpy(model.intercept_).double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        features @ weight.T + bias, torch.from_numpy(data.labels), reduction="sum"
    )
    (0.1 * losses + weight.square().sum() / 2).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.abs().max() < 2e-3
    assert bias.grad.abs().max() < 2e-3


def test_the_search_ends_an_eighth_of_a_decade_from_the_peak_after_fifteen_tries() -> None:
    for target in (-5.9, -0.3, 1.7, 6.0):
        tried: list[float] = []

        def measure(exponent: float, target: float = target, tried: list[float] = tried) -> float:
            tried.append(exponent)
            return -abs(exponent - target)

        assert abs(job.peak(measure) - target) <= 1 / 8
        assert len(tried) == len(set(tried)) <= 15
    assert job.peak(lambda _: 0.5) == -6  # of equals the strongest regularization


def test_a_class_never_seen_in_training_ranks_last() -> None:
    train, test = clusters(10, 0), clusters(4, 1)
    model = job.fit(train.pick(np.flatnonzero(train.labels != 1)), 1.0, Fits())
    ranks = job.ranks_of(model, test)
    assert ranks[4:8].tolist() == [2] * 4
    assert ranks[:4].tolist() == [0] * 4
    assert job.accuracy(model, test) == pytest.approx(2 / 3)


def test_the_split_takes_its_share_of_every_class() -> None:
    labels = np.array([0] * 10 + [1] * 4 + [2] * 2 + [3])
    held, rest = job.split(labels, 0.25, seed=0)
    assert sorted([*held, *rest]) == list(range(17))
    assert np.bincount(labels[held], minlength=4).tolist() == [2, 1, 1, 0]
    assert (job.split(labels, 0.25, seed=0)[0] == held).all()
    with pytest.raises(InputError, match="no class has two training images"):
        job.split(np.array([0, 1]), 0.5, 0)


def test_unfinished_fits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "MAX_ITERATIONS", 2)
    fits = Fits()
    job.fit(clusters(20, 0, spread=3.0), 1e6, fits)
    assert (fits.made, fits.unfinished) == (1, 1)


def test_impossible_options_and_unlike_classes_are_refused(
    weights: str, folders: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="validation must be"):
        LinearProbeConfig(weights=weights, out="", train="", test="", validation=1.0)
    with pytest.raises(InputError, match="shots and seeds"):
        LinearProbeConfig(weights=weights, out="", train="", test="", shots=[0])
    (Path(folders["test"]) / "red").rename(Path(folders["test"]) / "rose")
    with pytest.raises(InputError, match="must have the same classes"):
        run(weights, tmp_path / "out", **folders)
    with pytest.raises(InputError, match="all training images are of one class"):
        job.fit(clusters(3, 0, classes=1), 1.0, Fits())


def test_the_command_probes_real_boxes(weights: str, shared_data: Path, tmp_path: Path) -> None:
    for name, images in (("train", slice(0, 12)), ("test", slice(12, 16))):
        content = json.loads((shared_data / "coco_mini/instances_val.json").read_text())
        some = {image["id"] for image in content["images"][images]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in some]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    photographs = shared_data / "coco_mini/val"
    options = [f"{name}={photographs}" for name in ("train", "test")]
    options += [f"{name}_annotations={tmp_path / name}.json" for name in ("train", "test")]
    command = [
        "linear-probe",
        *options,
        f"weights={weights}",
        "shots=[1]",
        "seeds=1",
        f"out={tmp_path / 'out'}",
    ]
    assert cli.main(command) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["classes"] == 80
    assert 0 <= metrics["few_shot"]["1"]["top1"] <= 1
