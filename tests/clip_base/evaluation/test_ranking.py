"""Ties and numbers that are not finite: zero-shot, retrieval, probe, and validation during training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_base.evaluation import linear_probe as probe
from clip_base.evaluation.linear_probe import Fits, LabeledFeatures, LinearProbeConfig, linear_probe
from clip_base.evaluation.prompts import classifier
from clip_base.evaluation.ranking import ranks_of_best, ranks_of_classes
from clip_base.evaluation.retrieval import RetrievalConfig, recall_at, retrieval
from clip_base.evaluation.zeroshot import ZeroshotConfig, zeroshot
from clip_base.jobs.config import Plugin
from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError, InputNote
from clip_base.training.validation import Validation, ValidationConfig
from clip_base.weights.native import save_clip

COLORS = ("red", "green", "blue")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Nine images of three colors in folders, and a captions file of them."""
    images, texts = [], []
    for label, name in enumerate(COLORS):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(10 * label + number).integers(0, 120, (40, 40, 3), dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
            images.append({"id": len(images), "file_name": f"{name}/{number}.png"})
            texts.append({"image_id": images[-1]["id"], "caption": f"{name} number {number}"})
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": texts}))
    rows = [
        f"images/{image['file_name']},{text['caption']}" for image, text in zip(images, texts, strict=True)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["image,caption", *rows]))
    return tmp_path


def clip_with(make: Any, change: str) -> CLIP:
    """Returns a small CLIP with the whole vocabulary whose image embeddings are broken."""
    model: CLIP = make("vit")
    model = CLIP(type(model.config)(32, model.config.vision, type(model.config.text)(64, 1, 1, 20))).eval()
    with torch.no_grad():
        if change == "zero":
            model.visual.proj.zero_()
        elif change == "alike":
            # Only the class token's own part is left: no pixel reaches the embedding.
            model.visual.conv1.weight.zero_()
        else:
            model.visual.proj[0, 0] = float(change)
    return model


def jobs(world: Path, model: CLIP, weights: Path) -> dict[str, Any]:
    """Runs each job; returns its top-1 shares, or the message it ends with."""
    shared = {"weights": str(weights), "precision": "fp32"}
    images = str(world / "images")
    config = ValidationConfig(source=Plugin({"name": "csv", "file": str(world / "table.csv")}), images=images)
    runs = {
        "zeroshot": lambda out: zeroshot(
            ZeroshotConfig(out=str(out), images=images, templates="simple", **shared)
        ),
        "retrieval": lambda out: retrieval(
            RetrievalConfig(out=str(out), images=images, captions=str(world / "captions.json"), **shared)
        ),
        "probe": lambda out: linear_probe(
            LinearProbeConfig(out=str(out), train=images, test=images, layer="embedding", **shared)
        ),
    }
    found: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            run(world / name)
            metrics = json.loads((world / name / "metrics.json").read_text())
            found[name] = [value for key, value in metrics.items() if key == "top1" or key.endswith("R@1")]
        except InputError as error:
            found[name] = str(error)
    try:
        with torch.no_grad():
            found["training"] = list(Validation(config, model)(7).values())
    except InputError as error:
        found["training"] = str(error)
    return found


@pytest.mark.parametrize("change", ["zero", "alike"])
def test_embeddings_that_are_all_alike_find_nothing(world: Path, make: Any, change: str) -> None:
    model = clip_with(make, change)
    save_clip(model, world / "w.safetensors")
    found = jobs(world, model, world / "w.safetensors")
    assert {name: max(shares) for name, shares in found.items()} == {
        "zeroshot": pytest.approx(1 / 3 if change == "alike" else 0),  # one class is every image's nearest
        "retrieval": pytest.approx(1 / 9 if change == "alike" else 0),  # one caption likewise
        "probe": 0,
        "training": pytest.approx(1 / 3 if change == "alike" else 0),
    }


@pytest.mark.parametrize("change", ["nan", "inf"])
def test_weights_that_are_not_finite_are_named_by_every_job(world: Path, make: Any, change: str) -> None:
    model = clip_with(make, change)
    save_clip(model, world / "w.safetensors")
    found = jobs(world, model, world / "w.safetensors")
    for name in ("zeroshot", "retrieval", "probe"):
        assert (
            "w.safetensors cannot be used: 1 tensors hold NaN or infinity: visual.proj (1 of" in found[name]
        )
    assert (
        "the model at step 7: the embeddings of images are not finite, since 1 tensors" in found["training"]
    )
    assert "visual.proj" in found["training"]


def test_features_that_overflow_are_an_error_and_are_not_kept(world: Path, make: Any) -> None:
    model = clip_with(make, "zero")
    with torch.no_grad():
        model.visual.proj.fill_(3e38)
    save_clip(model, world / "w.safetensors")
    found = jobs(world, model, world / "w.safetensors")
    for name in ("zeroshot", "retrieval", "probe"):
        assert "w.safetensors: the embeddings of" in found[name]
        assert "though every weight is" in found[name]
        assert not list((world / name).glob("features/*"))


def test_ties_count_against() -> None:
    scores = torch.tensor([[3.0, 3.0, 1.0], [2.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 3.0, 2.0]])
    right = F.one_hot(torch.tensor([0, 1, 2, 1]), 3).bool()
    assert ranks_of_best(scores, right).tolist() == [1, 2, 2, 0]
    assert ranks_of_best(scores, torch.zeros(4, 3, dtype=torch.bool)).tolist() == [3] * 4
    right[0, 1] = True  # the tie of two right answers harms nobody
    assert ranks_of_best(scores, right)[0] == 0
    with pytest.raises(ValueError, match="NaN"):
        ranks_of_best(torch.tensor([[float("nan"), 0.0]]), torch.tensor([[True, False]]))


def test_equal_answers_tie_wherever_they_stand() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(37, 64, generator=generator), dim=-1)
    directions[36] = directions[3]  # at the edge, where a matrix product may round otherwise
    labels = torch.tensor([3, 36, 5])
    assert ranks_of_classes(directions[labels], directions, labels).tolist() == [1, 1, 0]


def test_two_classes_of_one_name_are_both_missed(world: Path, make: Any) -> None:
    model = clip_with(make, "0.1")
    save_clip(model, world / "w.safetensors")
    names = ["missile", "toad", "missile"]
    config = ZeroshotConfig(
        weights=str(world / "w.safetensors"),
        images=str(world / "images"),
        out=str(world / "out"),
        names=names,
    )
    with pytest.warns(InputNote, match="'missile': these names belong to more than one class"):
        zeroshot(config)
    table = (world / "out" / "per_class.csv").read_text().splitlines()
    assert [line.split(",")[3] for line in table[1:] if "missile" in line] == ["0.0", "0.0"]
    # In batches of 3 the copies stand beside texts of other lengths; they are embedded once all the same.
    directions = classifier(
        model, [*names, "a long name of a class"], ["{}", "a photo of a {}"], batch_size=3
    )
    assert torch.equal(directions[0], directions[2])


def test_captions_of_two_images_that_say_the_same_count_against() -> None:
    images = F.normalize(torch.eye(4) + 0.1, dim=-1)
    texts = images.clone()
    texts[1] = texts[0]
    figures = recall_at(images, texts, torch.arange(4), ks=(1, 2))
    assert figures["image_to_text_R@1"] == 0.5  # image 0 finds the copy, image 1's own caption is elsewhere
    assert figures["text_to_image_R@1"] == 0.75


def test_a_probe_on_constant_features_is_right_about_nothing() -> None:
    features = np.ones((12, 5), np.float32)
    data = LabeledFeatures(features, np.arange(12, dtype=np.int64) % 3)
    assert probe.accuracy(probe.fit(data, 1.0, Fits()), data) <= 1 / 3


def test_rank_of_an_unseen_class_is_the_number_of_known_ones() -> None:
    model = probe.fit(LabeledFeatures(np.eye(4, dtype=np.float32), np.array([0, 0, 2, 2])), 1.0, Fits())
    ranks: Tensor = probe.ranks_of(
        model, LabeledFeatures(np.eye(4, dtype=np.float32), np.array([1, 0, 2, 1]))
    )
    assert ranks.tolist() == [2, 0, 0, 2]
