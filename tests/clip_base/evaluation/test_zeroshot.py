from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from clip_base.evaluation.datasets import EvaluationImage, prepare_image
from clip_base.evaluation.prompts import SIMPLE, classifier, read_templates
from clip_base.evaluation.tables import summarize
from clip_base.evaluation.zeroshot import ZeroshotConfig, zeroshot
from clip_base.images.preprocess import Preprocess
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.weights.native import read_weights, save_clip, write_weights

COLORS = {"blue_sky": (20, 40, 230), "grass": (30, 200, 40), "red brick": (220, 30, 20)}
NAMES = ["blue sky", "grass", "red brick"]


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    return CLIP(CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=1, context_length=20))).eval()


@pytest.fixture(scope="module")
def weights(model: CLIP, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_clip(model, path)
    return str(path)


def picture(color: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (*size, 3))
    return Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for index, (name, color) in enumerate(COLORS.items()):
        (root / name).mkdir(parents=True)
        for number in range(3 + index):
            picture(color, number).save(root / name / f"{number}.png")
    (root / "grass" / "notes.txt").write_text("no image")
    return root


def run(weights: str, folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    config = ZeroshotConfig(weights=weights, images=str(folder), out=str(out), precision="fp32", **options)
    zeroshot(config)
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def expected(model: CLIP, pictures: list[tuple[Path, int]], templates: list[str]) -> list[bool]:
    """Computes which images are classified rightly, one prompt and one image at a time."""
    tokenizer, preprocess = Tokenizer(20), Preprocess(32)
    with torch.inference_mode():
        classes = []
        for name in NAMES:
            each = [
                F.normalize(model.encode_text(tokenizer(t.replace("{}", name))), dim=-1) for t in templates
            ]
            classes.append(F.normalize(torch.cat(each).mean(0), dim=0))
        right = []
        for path, label in pictures:
            feature = model.encode_image(preprocess(Image.open(path))[None])[0]
            right.append(int((torch.stack(classes) @ feature).argmax()) == label)
    return right


def test_the_published_templates_are_eighty_and_distinct():
    templates = read_templates("published")
    assert len(set(templates)) == len(templates) == 80
    assert all(template.count("{}") == 1 for template in templates)
    assert "itap of a {}." in templates


def test_the_published_templates_are_open_clips():
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    assert read_templates("published") == [make("{}") for make in metadata.OPENAI_IMAGENET_TEMPLATES]


def test_templates_without_a_place_for_the_name_are_refused(tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("# comment\n\na {}\nthe {}\n")
    assert read_templates(str(path)) == ["a {}", "the {}"]
    path.write_text("an image\n")
    with pytest.raises(InputError, match="'an image'"):
        read_templates(str(path))
    path.write_text("# only this\n")
    with pytest.raises(InputError, match="has no templates"):
        read_templates(str(path))
    with pytest.raises(InputError, match="does not exist"):
        read_templates("publishd")


def test_a_class_is_the_mean_of_its_prompts_whatever_the_batch(model: CLIP):
    templates = ["a {}.", "the {} in the rain.", "{}"]
    directions = classifier(model, NAMES, templates, batch_size=2)
    torch.testing.assert_close(directions, classifier(model, NAMES, templates, batch_size=100))
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3))
    assert directions.shape == (3, 32)


@pytest.mark.parametrize("templates", ["simple", "published"])
def test_figures_are_those_of_one_picture_at_a_time(
    model: CLIP, weights: str, folder: Path, tmp_path: Path, templates: str
):
    metrics = run(weights, folder, tmp_path / "out", templates=templates, batch_size=4)
    pictures = [
        (path, label) for label, name in enumerate(COLORS) for path in sorted((folder / name).glob("*.png"))
    ]
    right = expected(model, pictures, [SIMPLE] if templates == "simple" else read_templates(templates))
    assert metrics["images"] == len(right) == 12
    assert metrics["top1"] == pytest.approx(sum(right) / 12)
    assert metrics["top5"] == 1.0  # there are only three classes
    of_class = [[r for r, (_, label) in zip(right, pictures, strict=True) if label == c] for c in range(3)]
    assert metrics["mean_per_class"] == pytest.approx(sum(sum(rs) / len(rs) for rs in of_class) / 3)
    rows = list(csv.DictReader((tmp_path / "out" / "per_class.csv").open()))
    assert [row["name"] for row in rows] == NAMES
    assert [int(row["images"]) for row in rows] == [3, 4, 5]


def test_broken_images_are_skipped_and_listed_and_too_many_stop(weights: str, folder: Path, tmp_path: Path):
    (folder / "grass" / "bad.jpg").write_bytes(b"not a picture")
    metrics = run(weights, folder, tmp_path / "out", templates="simple")
    assert (metrics["images"], metrics["skipped"]) == (12, 1)
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert entry["image"].endswith("bad.jpg")
    assert "does not decode" in entry["reason"]
    with pytest.raises(InputError, match="1 of 13 images cannot be used"):
        run(weights, folder, tmp_path / "strict", templates="simple", max_skipped=0.05)
    assert not (tmp_path / "strict" / "metrics.json").exists()


def test_a_finished_run_is_not_done_again(
    weights: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = run(weights, folder, tmp_path / "out", templates="simple")
    capsys.readouterr()
    assert run(weights, folder, tmp_path / "out", templates="simple") == first
    assert "is complete" in capsys.readouterr().out


def test_a_finished_run_does_not_answer_for_other_weights(weights: str, folder: Path, tmp_path: Path):
    mine = tmp_path / "w.safetensors"
    mine.write_bytes(Path(weights).read_bytes())
    run(str(mine), folder, tmp_path / "out", templates="simple")
    tensors, metadata = read_weights(mine)
    write_weights(mine, tensors, metadata)  # the same ones
    run(str(mine), folder, tmp_path / "out", templates="simple")
    write_weights(mine, {**tensors, "logit_scale": tensors["logit_scale"] + 1}, metadata)
    with pytest.raises(InputError, match=r"weights \(.*w\.safetensors\) changed since"):
        run(str(mine), folder, tmp_path / "out", templates="simple")


def test_class_names_come_from_a_list_or_a_file_and_must_fit(weights: str, folder: Path, tmp_path: Path):
    (tmp_path / "names.txt").write_text("sky\nmeadow\nwall\n")
    run(weights, folder, tmp_path / "file", templates="simple", names=[str(tmp_path / "names.txt")])
    run(weights, folder, tmp_path / "list", templates="simple", names=["sky", "meadow", "wall"])
    tables = [(tmp_path / name / "per_class.csv").read_text() for name in ("file", "list")]
    assert tables[0] == tables[1]
    assert "meadow" in tables[0]
    with pytest.raises(InputError, match="gives 2 names, the images have 3 classes"):
        run(weights, folder, tmp_path / "few", names=["a", "b"])


def test_a_folder_without_classes_is_refused(weights: str, tmp_path: Path):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="no images in subfolders"):
        run(weights, tmp_path / "empty", tmp_path / "out")


def coco(tmp_path: Path) -> dict[str, Any]:
    images = tmp_path / "coco"
    images.mkdir()
    canvas = Image.new("RGB", (100, 80), (128, 128, 128))
    canvas.paste(picture(COLORS["grass"], 1), (10, 20))
    canvas.paste(picture(COLORS["red brick"], 2), (50, 20))
    canvas.save(images / "one.png")
    boxes = [(7, [10, 20, 30, 40]), (3, [60, 20, 30.4, 40]), (3, [90, 70, 400, 400]), (3, [5, 5, 0, 9])]
    content = {
        "images": [{"id": 1, "file_name": "one.png"}],
        "categories": [{"id": 7, "name": "grass"}, {"id": 3, "name": "red brick"}],
        "annotations": [{"image_id": 1, "category_id": c, "bbox": box, "iscrowd": 0} for c, box in boxes]
        + [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return content


def test_boxes_of_a_coco_file_are_cut_out_and_classified(model: CLIP, weights: str, tmp_path: Path):
    coco(tmp_path)
    options = {"annotations": str(tmp_path / "instances.json"), "templates": "simple", "max_skipped": 0.5}
    metrics = run(weights, tmp_path / "coco", tmp_path / "out", **options)
    assert (metrics["images"], metrics["skipped"], metrics["classes"]) == (3, 1, 2)
    rows = list(csv.DictReader((tmp_path / "out" / "per_class.csv").open()))
    assert [(row["name"], row["images"]) for row in rows] == [("red brick", "2"), ("grass", "1")]
    assert "holds no pixels" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_a_box_is_cut_out_at_its_pixels(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)

    def prepare(pixels: Any) -> torch.Tensor:
        return Preprocess(16)(Image.fromarray(pixels))

    loaded = prepare_image(lambda _: pixels, prepare, EvaluationImage(tmp_path, 0, (60.0, 20.0, 30.4, 39.9)))
    assert isinstance(loaded, torch.Tensor)
    assert torch.equal(loaded, prepare(pixels[20:60, 60:91]))
    assert "not finite" in str(
        prepare_image(lambda _: pixels, prepare, EvaluationImage(tmp_path, 0, (float("nan"), 0, 1, 1)))
    )


@pytest.mark.parametrize("gone", ["images", "categories", "annotations"])
def test_a_file_that_is_no_coco_file_is_refused(weights: str, tmp_path: Path, gone: str):
    content = coco(tmp_path)
    del content[gone]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not in COCO's instances form"):
        run(weights, tmp_path / "coco", tmp_path / "out", annotations=str(tmp_path / "instances.json"))


def test_figures_of_known_ranks():
    ranks = torch.tensor([0, 0, 3, 5, -1, 0])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    figures, classes = summarize(ranks, labels, ["a", "b", "c", "d"])
    assert figures["top1"] == pytest.approx(3 / 5)
    assert figures["top5"] == pytest.approx(4 / 5)
    assert figures["mean_per_class"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert (figures["images"], figures["classes"]) == (5, 4)
    assert [entry["images"] for entry in classes] == [3, 1, 1, 0]
    assert classes[3]["top1"] is None


def test_real_boxes_are_classified(weights: str, shared_data: Path, tmp_path: Path):
    content = json.loads((shared_data / "coco_mini" / "instances_val.json").read_text())
    some = [image["id"] for image in content["images"][:4]]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in some]
    (tmp_path / "few.json").write_text(json.dumps(content))
    metrics = run(
        weights,
        shared_data / "coco_mini" / "val",
        tmp_path / "out",
        annotations=str(tmp_path / "few.json"),
        templates="simple",
    )
    assert metrics["classes"] == 80
    assert metrics["images"] + metrics["skipped"] == sum(
        not entry.get("iscrowd") for entry in content["annotations"]
    )
