"""Generated worlds of one object per image, small towers, and jobs as functions: what experiments share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from clip_base.jobs import plugins
from clip_base.jobs.config import resolve

SIZE = 32  # pixels of the images' sides
TOWER = [
    "tower.embed_dim=128",
    "tower.vision.kind=resnet",
    "tower.vision.layers=[1,1,1,1]",
    "tower.vision.width=16",
    "tower.vision.head_width=32",
    f"tower.vision.resolution={SIZE}",
    "tower.text.width=64",
    "tower.text.heads=1",
    "tower.text.layers=1",
    "tower.text.context_length=24",
]
# Large objects without distractors, whose captions name no colors: small towers learn them in minutes.
PLAIN: dict[str, Any] = {
    "size": SIZE,
    "objects_max": 1,
    "object_min": 0.5,
    "object_max": 0.65,
    "distractors": 0,
    "colors": 0,
}


def job(name: str, **options: object) -> Path:
    """Runs a job; returns its folder."""
    function: Any = plugins.load(plugins.JOBS, name)
    given = [f"{key.replace('__', '.')}={value}" for key, value in options.items()]
    function(resolve(plugins.schema_of(function), None, [*(TOWER if name == "pretrain" else []), *given]))
    return Path(str(options["out"]))


def coco(world: Path) -> dict[str, Any]:
    """Returns the options of the source of a world's training pairs."""
    captions, images = world / "captions_train.json", world / "images"
    return {"source__name": "coco", "source__captions": captions, "source__images": images}


def training(steps: int, batch_size: int, seed: int, lr: float = 2e-3) -> dict[str, Any]:
    """Returns the options of a training."""
    return {
        "train__steps": steps,
        "train__batch_size": batch_size,
        "train__warmup_steps": 50,
        "train__lr": lr,
        "train__seed": seed,
        "train__workers": 0,
        "cache": "true",
    }


def same(pixels: np.ndarray) -> np.ndarray:
    return pixels


def by_class(
    world: Path, split: str, count: int, out: Path, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Copies so many images of each category into a folder of its name, changed."""
    content = json.loads((world / f"instances_{split}.json").read_text())
    names = {entry["id"]: entry["name"].replace(" ", "_") for entry in content["categories"]}
    files = {entry["id"]: entry["file_name"] for entry in content["images"]}
    found = dict.fromkeys(names.values(), 0)
    for entry in content["annotations"]:
        name = names[entry["category_id"]]
        if found[name] < count:
            found[name] += 1
            (out / name).mkdir(parents=True, exist_ok=True)
            pixels = cv2.imread(str(world / "images" / files[entry["image_id"]]))
            assert pixels is not None
            cv2.imwrite(str(out / name / f"{found[name]:04d}.png"), change(pixels))
    assert min(found.values()) == count, found
