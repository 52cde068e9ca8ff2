"""What the golden tests share: a synthetic dataset, seeded tiny weights, and the jobs as a user calls them.

The tests compare with values stored in `data/`, which a refactor must not move. For a change that means to
move them, write them anew and look at the difference:

    GOLDEN_WRITE=1 pytest tests/golden; git diff --stat tests/golden/data

All imports from the packages and all names of jobs and options stand in this file, so that a renamed module
or option is one change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clip_base.jobs.cli import main, main_regionclip
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.weights.native import save_clip

DATA = Path(__file__).with_name("data")
VISION = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=64)
TEXT = TextConfig(width=32, heads=1, layers=1, context_length=24)

SIZE = {"resize.short": "[64]", "resize.long": 64}
FLOAT32 = {"precision": "fp32", "device": "cpu"}
TRAIN = {
    "train.steps": 20,
    "train.batch_size": 4,
    "train.optimizer": "sgd",  # Adam divides by small gradients, which magnifies rounding
    "train.lr": 0.0002,  # ten times as much, and rounding differences grow to a hundredth of the loss
    "train.weight_decay": 0.0001,
    "train.warmup_steps": 5,
    "train.schedule": "cosine",
    "train.milestones": "[]",
    "train.max_grad_norm": 5.0,
    "train.precision": "fp32",
    "train.log_every": 1,
    "train.seed": 3,
    "train.device": "cpu",
}
# Columns of log.jsonl that are no result of the computation.
NO_RESULT = {"step", "lr", "images_per_second"}

Options = dict[str, object]
Stored = Callable[..., Any]


def _run(call: Callable[[list[str]], int], job: str, options: Options) -> None:
    assert call([job, *(f"{name}={value}" for name, value in options.items())]) == 0


def _region_job(job: str, out: Path, *groups: Options) -> Path:
    """Runs a job of `regionclip` into a folder; returns the folder."""
    options: Options = {"out": out}
    for group in groups:
        options |= group
    _run(main_regionclip, job, options)
    return out


@torch.no_grad()
def _tiny_clip() -> CLIP:
    """Makes a seeded CLIP whose embeddings of different images differ, as random ones hardly do."""
    torch.manual_seed(17)
    model = CLIP(CLIPConfig(32, VISION, TEXT))
    norms = []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            norms.append(module)
            if name.endswith("bn3"):  # as initialized every block is the identity, which tests little
                nn.init.uniform_(module.weight, 0.5, 1.0)
            module.momentum = 1.0
    images = nn.functional.interpolate(torch.randn(16, 3, 8, 8) + torch.randn(16, 3, 1, 1), (64, 64))
    for _ in norms:  # each pass settles the statistics of one more layer
        model.train().encode_image(images)
    for norm in norms:
        norm.momentum = 0.1
    bias = model.visual.attnpool.c_proj.bias  # type: ignore[union-attr]
    bias -= model.eval().encode_image(images).mean(0)  # type: ignore[operator]
    return model


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four validation images of 64 pixels; twelve base categories, four novel ones."""
    out = tmp_path_factory.mktemp("golden") / "world"
    options: Options = {"out": out, "images": 12, "val_images": 4, "size": 64, "object_min": 0.3, "seed": 9}
    _run(main, "scenes", options | {"workers": 1})
    return out


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP as a file."""
    path = tmp_path_factory.mktemp("golden") / "clip.safetensors"
    save_clip(_tiny_clip(), path)
    return path


@pytest.fixture(scope="session")
def base_boxes(world: Path) -> Options:
    """What training on the base categories' boxes reads."""
    annotations, split = world / "instances_train.json", world / "split.json"
    return {"annotations": annotations, "images": world / "images", "split": split, **SIZE}


@pytest.fixture(scope="session")
def mine(world: Path, clip_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Mines the world with a matcher by name; returns the mined folder."""
    folder = tmp_path_factory.mktemp("golden")
    content = json.loads((world / "instances_train.json").read_text())
    concepts = folder / "concepts.jsonl"
    with concepts.open("w") as file:
        for entry in content["categories"]:
            line = {"concept": entry["name"], "count": 3, "examples": [], "kind": "given"}
            file.write(json.dumps(line) + "\n")
    options: Options = {
        "images": world / "images",
        "captions": world / "captions_train.json",
        "weights": clip_file,
        "concepts": concepts,
        "proposer.name": "grid",
        "proposer.sizes": "[0.5,1.0]",
        "batch_size": 4,
        "shard_images": 5,
        **SIZE,
        **FLOAT32,
    }
    lenient = {"pool": "matcher.min_probability", "caption": "matcher.min_probability"}
    lenient["hybrid"] = "matcher.min_pool_probability"

    def run(matcher: str) -> Path:
        keep_all = {lenient[matcher]: 0.0}
        return _region_job("mine", folder / matcher, options, {"matcher.name": matcher, **keep_all})

    return run


@pytest.fixture(scope="session")
def pretrained(
    mine: Callable[[str], Path], clip_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Twenty steps of region-text pretraining with its three losses and the memory of negatives."""
    options: Options = {"mined": mine("caption"), "weights": clip_file, "max_regions": 6, "memory": 8}
    return _region_job("pretrain", tmp_path_factory.mktemp("golden") / "pretrained", options, SIZE, TRAIN)


@pytest.fixture(scope="session")
def proposal_network(base_boxes: Options, clip_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of the proposal network."""
    options: Options = {"network.backbone_weights": clip_file, "network.channels": 16, "network.samples": 64}
    out = tmp_path_factory.mktemp("golden") / "proposal_network"
    return _region_job("train-rpn", out, base_boxes, options, TRAIN | {"train.lr": 0.01})


@pytest.fixture(scope="session")
def train_detector(
    base_boxes: Options, clip_file: Path, proposal_network: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Trains the detector: train_detector(name, options of training) returns the run's folder."""
    options: Options = {"weights": clip_file, "rpn": proposal_network / "model.safetensors"}
    options["keep_student"] = "never"
    options |= {"max_proposals": 30, "rois_per_image": 16, "detector.max_proposals": 20}
    folder = tmp_path_factory.mktemp("golden")

    def run(name: str, training: Options) -> Path:
        return _region_job("train-detector", folder / name, base_boxes, options, TRAIN, training)

    return run


@pytest.fixture(scope="session")
def detector(train_detector: Callable[..., Path]) -> Path:
    """Twenty steps of the detector."""
    return train_detector("long", {})


@pytest.fixture(scope="session")
def detector_file(train_detector: Callable[..., Path]) -> Path:
    """A detector whose box head has left its zeros; so few steps magnify rounding little."""
    training: Options = {"train.steps": 3, "train.warmup_steps": 0, "train.lr": 0.001}
    return train_detector("short", training) / "model.safetensors"


@pytest.fixture(scope="session")
def detected(
    world: Path, detector_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The entries of detections.json over the validation images."""
    out = tmp_path_factory.mktemp("golden") / "detected"
    options: Options = {
        "images": f"[{world / 'images' / 'val'}]",
        "weights": detector_file,
        "multi_label": True,
    }
    names = [name for part in json.loads((world / "split.json").read_text()).values() for name in part]
    options["vocabulary"] = ",".join(names)
    _region_job("detect", out, options, SIZE, FLOAT32)
    entries: list[dict[str, Any]] = json.loads((out / "detections.json").read_text())
    return entries


@pytest.fixture(scope="session")
def evaluate(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, float]]:
    """Evaluates on the training images: evaluate(name, **options) gives metrics.json."""
    folder = tmp_path_factory.mktemp("golden")
    options: Options = {"annotations": world / "instances_train.json", "split": world / "split.json"}
    options |= {"images": world / "images", **SIZE, **FLOAT32}

    def run(name: str, **given: object) -> dict[str, float]:
        _region_job("evaluate", folder / name, options, given)
        metrics: dict[str, float] = json.loads((folder / name / "metrics.json").read_text())
        return metrics

    return run


@pytest.fixture(scope="session")
def logged() -> Callable[[Path], dict[str, list[float]]]:
    """Reads a run's log: the values of each column, by step."""

    def read(folder: Path) -> dict[str, list[float]]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return {name: [line[name] for line in lines] for name in lines[0] if name not in NO_RESULT}

    return read


@pytest.fixture(scope="session")
def stored() -> Stored:
    """stored(name, measured) reads data/NAME.json; GOLDEN_WRITE has it write `measured` there first."""

    def read(name: str, measured: Any) -> Any:
        path = DATA / f"{name}.json"
        if os.environ.get("GOLDEN_WRITE"):
            path.write_text(_lines(measured) + "\n")
        return json.loads(path.read_text())

    return read


def _lines(value: Any) -> str:
    """Writes JSON with one line per entry of the outermost list or object."""
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    return "[\n" + ",\n".join(json.dumps(entry) for entry in value) + "\n]"
