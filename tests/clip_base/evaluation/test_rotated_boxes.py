"""Boxes cut from images with an EXIF orientation: zero-shot classification and the probe read them alike."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_base.evaluation.datasets import coco_images
from clip_base.evaluation.features import Embedder, FeatureConfig
from clip_base.jobs import cli
from clip_base.models.clip import CLIP
from clip_base.weights.native import save_clip


def with_note(image: Image.Image, orientation: int) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def scene(folder: Path, orientation: int, upright_boxes: bool) -> Path:
    """Writes a colored image as a phone does, and boxes of one color each; returns the annotations."""
    folder.mkdir()
    (folder / "images").mkdir()
    colors = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
    seen = Image.new("RGB", (120, 90))
    boxes = {name: (5 + 40 * place, 50, 25, 30) for place, name in enumerate(colors)}
    for name, (x, y, w, h) in boxes.items():
        seen.paste(colors[name], (x, y, x + w, y + h))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = seen.transpose(back[orientation])
    (folder / "images" / "a.png").write_bytes(with_note(stored, orientation))
    if not upright_boxes:
        whole = np.asarray(stored)
        for name, color in colors.items():
            rows, columns = np.nonzero((whole == color).all(-1))
            left, top = int(columns.min()), int(rows.min())
            boxes[name] = (left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1)
    width, height = (seen if upright_boxes else stored).size
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
        "categories": [{"id": place, "name": name} for place, name in enumerate(colors)],
        "annotations": [
            {"image_id": 1, "category_id": place, "bbox": boxes[name]} for place, name in enumerate(colors)
        ],
    }
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("orientation", "upright"), [(6, True), (6, False), (8, True), (8, False), (3, True)]
)
def test_zero_shot_cuts_every_box_where_it_lies(
    orientation: int, upright: bool, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = scene(tmp_path / "data", orientation, upright)
    model: CLIP = make("vit")
    save_clip(model, tmp_path / "w.safetensors")
    crops: list[Tensor] = []

    def keep(_: CLIP, pixels: Tensor) -> Tensor:
        crops.extend(pixels)
        return torch.zeros(len(pixels), 32)

    monkeypatch.setattr(CLIP, "encode_image", keep)
    _, pictures = coco_images(str(annotations), str(tmp_path / "data" / "images"))
    config = FeatureConfig(weights=str(tmp_path / "w.safetensors"), out="", precision="fp32")
    found = Embedder(config, tmp_path / "out")(pictures, "boxes")
    assert found.skipped == []
    for picture, crop in zip(pictures, crops, strict=True):
        assert int(crop.mean((1, 2)).argmax()) == picture.label
        assert crop.std((1, 2)).max() < 1e-3  # one color to the edges


def test_the_command_says_once_what_no_size_decides(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_base.images.orientation.notes_given", set())
    annotations = scene(tmp_path / "data", 3, upright_boxes=True)
    data = tmp_path / "data"
    for name in ("b", "c"):
        (data / "images" / f"{name}.png").write_bytes((data / "images" / "a.png").read_bytes())
    content = json.loads(annotations.read_text())
    first = content["images"][0]
    content["images"] = [{**first, "id": 1 + k, "file_name": f"{name}.png"} for k, name in enumerate("abc")]
    content["annotations"] = [{**box, "image_id": 1 + k} for box in content["annotations"] for k in range(3)]
    annotations.write_text(json.dumps(content))
    model = make("vit")
    model = CLIP(type(model.config)(32, model.config.vision, type(model.config.text)(64, 1, 1, 20)))
    save_clip(model, tmp_path / "w.safetensors")
    options = [
        f"annotations={annotations}",
        f"images={data / 'images'}",
        f"weights={tmp_path / 'w.safetensors'}",
    ]
    assert cli.main(["zeroshot", *options, f"out={tmp_path / 'out'}", "workers=2"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "such images are rotated by their orientation" in notes[0]
    rows = list(csv.DictReader((tmp_path / "out" / "per_class.csv").open()))
    assert [int(row["images"]) for row in rows] == [3, 3, 3]


def test_a_stated_size_that_fits_in_no_frame_is_skipped_with_the_reason(tmp_path: Path, make: Any) -> None:
    annotations = scene(tmp_path / "data", 6, upright_boxes=True)
    content = json.loads(annotations.read_text())
    content["images"][0] |= {"width": 60, "height": 45}
    annotations.write_text(json.dumps(content))
    save_clip(make("vit"), tmp_path / "w.safetensors")
    _, pictures = coco_images(str(annotations), str(tmp_path / "data" / "images"))
    found = Embedder(FeatureConfig(weights=str(tmp_path / "w.safetensors"), out=""), tmp_path)(
        pictures, "boxes"
    )
    assert len(found.skipped) == 3
    assert "has it been resized?" in found.skipped[0]["reason"]
