"""Datasets in CLIP_benchmark's layout give the figures that the same images give in files.

Covered: zero-shot classification, the linear probe's reader, retrieval, prompt templates.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_base.evaluation.datasets import folder_images
from clip_base.evaluation.prompts import read_templates
from clip_base.evaluation.retrieval import RetrievalConfig, retrieval
from clip_base.evaluation.zeroshot import ZeroshotConfig, zeroshot
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError, InputNote
from clip_base.weights.native import save_clip

NAMES = ["blue sky", "grass", "red brick"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_clip(CLIP(CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=1, context_length=20))), path)
    return str(path)


def encoded(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "webp", lossless=True)
    return out.getvalue()


def tars(folder: Path, records: list[dict[str, bytes]], per_tar: int = 4) -> None:
    folder.mkdir(parents=True)
    for start in range(0, len(records), per_tar):
        with tarfile.open(folder / f"{start // per_tar}.tar", "w") as tar:
            for number, record in enumerate(records[start : start + per_tar], start):
                for extension, data in record.items():
                    info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "nshards.txt").write_text(f"{-(-len(records) // per_tar)}\n")


@pytest.fixture
def wds(tmp_path: Path) -> Path:
    """Twelve images of three classes, in the order of classes, as the published datasets are."""
    root = tmp_path / "wds_colors"
    records = [{"cls": str(n // 4).encode(), "webp": encoded(n)} for n in range(12)]
    for part in ("test", "train"):
        tars(root / part, records)
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of {c}\n")
    return root


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "files"
    for n in range(12):
        (root / NAMES[n // 4]).mkdir(parents=True, exist_ok=True)
        (root / NAMES[n // 4] / f"{n}.webp").write_bytes(encoded(n))
    return root


def classified(weights: str, images: Path, out: Path, **options: Any) -> dict[str, Any]:
    zeroshot(ZeroshotConfig(weights=weights, images=str(images), out=str(out), precision="fp32", **options))
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def test_zero_shot_classification_gives_what_files_give(
    weights: str, wds: Path, files: Path, tmp_path: Path
) -> None:
    own = str(wds / "zeroshot_classification_templates.txt")
    wanted = classified(weights, files, tmp_path / "a", templates=own)
    for number, place in enumerate((wds, wds / "test")):
        assert classified(weights, place, tmp_path / f"b{number}", templates=own) == wanted
    assert wanted["images"] == 12
    with pytest.warns(
        InputNote, match=r"templates=.*zeroshot_classification_templates.txt uses the dataset's"
    ):
        classified(weights, wds, tmp_path / "c")


def test_templates_of_clip_benchmark_mean_the_same(wds: Path) -> None:
    found = read_templates(str(wds / "zeroshot_classification_templates.txt"))
    assert found == ["a photo of a {}.", "a drawing of {}"]


def test_both_parts_have_the_classes_for_a_linear_probe(wds: Path) -> None:
    for part in ("train", "test"):
        names, pictures = folder_images(str(wds / part))
        assert names == NAMES
        assert [picture.label for picture in pictures] == [0] * 4 + [1] * 4 + [2] * 4
        assert f"/{part}/0.tar/s0000000.webp" in str(pictures[0].path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "classnames.txt").unlink(), "no classnames.txt"),
        (lambda root: (root / "classnames.txt").write_text("a\nb\n"), r"its class is '2'; .* has 2 names"),
        (
            lambda root: (root / "dataset_type.txt").write_text("multilabel\n"),
            "a dataset for multilabel, not for",
        ),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(wds: Path, change: Any, message: str) -> None:
    change(wds)
    with pytest.raises(InputError, match=message):
        folder_images(str(wds))


def test_retrieval_gives_what_files_give(weights: str, tmp_path: Path) -> None:
    captions = [[f"thing {n} {k}" for k in range(1 + n % 6)] for n in range(9)]
    records = [{"webp": encoded(n), "txt": "\n".join(captions[n]).encode()} for n in range(9)]
    root = tmp_path / "wds_flickr"
    tars(root / "test", [*records, {"webp": encoded(9)}])
    (root / "dataset_type.txt").write_text("retrieval")
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    (tmp_path / "images").mkdir()
    for n in range(9):
        (tmp_path / "images" / f"{n}.webp").write_bytes(encoded(n))
        content["images"].append({"id": n, "file_name": f"{n}.webp"})
        content["annotations"] += [{"image_id": n, "caption": text} for text in captions[n]]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    found = []
    for name, options in {
        "tars": {"captions": str(root)},
        "files": {"captions": str(tmp_path / "captions.json"), "images": str(tmp_path / "images")},
    }.items():
        given = RetrievalConfig(
            weights=weights, out=str(tmp_path / name), precision="fp32", max_skipped=0.2, **options
        )
        retrieval(given)
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert found[0].pop("skipped") == 1  # the record without captions
    assert found[1].pop("skipped") == 0
    assert found[0] == found[1]
    assert found[0]["texts"] == sum(min(len(own), 5) for own in captions)
    for options, message in (
        ({"captions": str(root), "images": "x"}, "omit images="),
        ({"captions": str(tmp_path / "captions.json")}, "images= is missing"),
        ({"captions": str(tmp_path / "images")}, "holds no tars"),
    ):
        with pytest.raises(InputError, match=message):
            retrieval(RetrievalConfig(weights=weights, out=str(tmp_path / "x"), **options))
