"""Someone else's package adds a job, parts and formats by declaring them; nothing here knows of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from clip_base.jobs.cli import main_regionclip
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.weights.native import read_weights, save_clip

PACKAGE = Path(__file__).parent / "shapes_plugin"


def install(target: Path) -> None:
    """Puts the package and what pip would write about it into `target`, without a build or a network."""
    declared = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    name, version = declared["name"].replace("-", "_"), declared["version"]
    shutil.copytree(PACKAGE / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    info = target / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {declared['name']}\nVersion: {version}\n")
    lines: list[str] = []
    for group, points in sorted(declared["entry-points"].items()):
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    install(target)
    return target


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three images, one of each shape; in each a thing fills the middle."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number, (height, width) in enumerate([(40, 80), (80, 40), (60, 60)], 1):
        pixels = np.full((height, width, 3), 90, np.uint8)
        box = [width // 4, height // 4, width // 2, height // 2]
        pixels[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 255
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), pixels)
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0})
        annotations[-1]["area"] = box[2] * box[3]
    categories = [{"id": 1, "name": "thing"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(data))
    return tmp_path


SHELL = """
import contextlib, io, json, sys
from clip_base.jobs import cli

results = []
for program, *arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = getattr(cli, program)(arguments)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def commands(site: Path, *calls: list[str]) -> list[tuple[int, str, str]]:
    """Gives commands, one after another, to a process in which the plugin is installed in `site`."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.run(
        [sys.executable, "-c", SHELL, json.dumps(calls)], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return [(code, out, err) for code, out, err in json.loads(child.stdout)]


def test_its_job_is_listed_explained_and_run(installed: Path, dataset: Path) -> None:
    job = [
        "main",
        "count-shapes",
        f"images={dataset / 'images'}",
        f"out={dataset / 'out'}",
        "--tolerance",
        "0.2",
    ]
    calls = [["main", "--help"], ["main", "count-shapes", "--help"], job, [*job, "toleranse=1"]]
    overview, explained, done, wrong = commands(installed, *calls)
    assert "Counts images that are wide, tall and square." in overview[1]
    assert "tolerance (float, default 0.1)" in explained[1]
    assert done == (0, "square 1, tall 1, wide 1\n", "")
    assert json.loads((dataset / "out" / "metrics.json").read_text()) == {"square": 1, "tall": 1, "wide": 1}
    assert wrong == (2, "", "error: there is no option 'toleranse'; did you mean 'tolerance'?\n")


def test_its_proposer_is_named_like_our_own(installed: Path, dataset: Path) -> None:
    job = ["main_regionclip", "propose", f"annotations={dataset / 'instances.json'}"]
    job += [f"images={dataset / 'images'}", "proposer.name=center"]
    out, other = f"out={dataset / 'out'}", f"out={dataset / 'other'}"
    calls = [[*job, out], [*job, other, "proposer.share=3"], [*job, other, "proposer.shar=1"]]
    done, wrong, unknown = commands(installed, *calls)
    assert (done[0], done[2]) == (0, "")
    proposals = json.loads((dataset / "out" / "proposals.json").read_text())
    boxes = {entry["image_id"]: entry["bbox"] for entry in proposals}
    expected = {1: [20, 10, 40, 20], 2: [10, 20, 20, 40], 3: [15, 15, 30, 30]}
    assert boxes.keys() == expected.keys()
    for number, box in expected.items():
        assert boxes[number] == pytest.approx(box, abs=1)
    assert "share: 0.5" in (dataset / "out" / "config.yaml").read_text()
    assert wrong == (2, "", "error: share must be above 0 and at most 1, found 3.0\n")
    assert unknown[0] == 2
    assert unknown[2] == "error: proposer (center): there is no option 'shar'; did you mean 'share'?\n"


def test_its_annotation_format_serves_every_job(installed: Path, dataset: Path) -> None:
    lines = [
        "1.png 40 80 thing 20 10 60 30",
        "2.png 80 40 thing 10 20 30 60",
        "3.png 60 60 thing 15 15 45 45",
    ]
    (dataset / "truth.boxes").write_text("\n".join(lines) + "\n")
    results = [{"image_id": 1, "category_id": 1, "bbox": [20, 10, 40, 20], "score": 0.9}]
    (dataset / "results.json").write_text(json.dumps(results))
    propose = ["main_regionclip", "propose", f"images={dataset / 'images'}", "proposer.name=center"]
    evaluate = ["main_regionclip", "evaluate", f"results={dataset / 'results.json'}", "report=false"]
    truth = f"annotations={dataset / 'truth.boxes'}"
    (dataset / "bad.boxes").write_text("1.png 40 80 thing 20\n")
    calls = [
        [*propose, truth, f"out={dataset / 'proposed'}"],
        [*evaluate, truth, f"out={dataset / 'evaluated'}"],
        [*evaluate, f"annotations={dataset / 'bad.boxes'}", f"out={dataset / 'bad'}"],
    ]
    proposed, evaluated, bad = commands(installed, *calls)
    assert (proposed[0], evaluated[0]) == (0, 0)
    assert len(json.loads((dataset / "proposed" / "proposals.json").read_text())) == 3
    metrics = json.loads((dataset / "evaluated" / "metrics.json").read_text())
    assert metrics["AP50"] == pytest.approx(1 / 3, abs=0.01)  # one of three objects, found exactly
    assert bad[0] == 2
    assert "bad.boxes, line 1 is not FILE HEIGHT WIDTH NAME" in bad[2]


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    """A CLIP of a few thousand weights."""
    torch.manual_seed(0)
    vision = VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=64)
    text = TextConfig(width=32, heads=1, layers=1, context_length=24)
    save_clip(CLIP(CLIPConfig(32, vision, text)), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def test_its_box_head_is_trained_saved_and_loaded_again(
    installed: Path, dataset: Path, clip_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / "split.json").write_text(json.dumps({"base": ["thing"], "novel": []}))
    train = ["main_regionclip", "train-detector", f"annotations={dataset / 'instances.json'}"]
    train += [f"images={dataset / 'images'}", f"split={dataset / 'split.json'}", f"weights={clip_file}"]
    train += ["rpn=shared", "network.channels=16", "resize.short=[64]", "resize.long=96"]
    train += ["train.steps=2", "train.batch_size=2", "train.workers=0", "train.device=cpu"]
    weights = dataset / "trained" / "model.safetensors"
    detect = ["main_regionclip", "detect", str(dataset / "images"), f"weights={weights}", "vocabulary=thing"]
    calls = [
        ["main_regionclip", "train-detector", "--help-all"],
        [*train, "box_head=mean", f"out={weights.parent}"],
        [*detect, f"out={dataset / 'found'}", "device=cpu"],
    ]
    explained, trained, detected = commands(installed, *calls)
    assert "embedding|map|mean" in explained[1]
    assert trained[0] == 0, trained[2]
    assert detected[0] == 0, detected[2]
    assert json.loads((dataset / "found" / "detections.json").read_text())
    tensors, metadata = read_weights(weights)
    assert metadata["box_head"] == "mean"
    assert tensors["box_head.both.weight"].shape == (4, 32 + 8 * 32)
    assert bool(tensors["box_head.both.bias"].any())  # it was trained
    assert main_regionclip([*detect[1:], f"out={dataset / 'elsewhere'}"]) == 2  # without the package
    told = capsys.readouterr().err
    assert f"{weights} was trained with box_head='mean'" in told
    assert "install the package" in told


def test_pip_writes_the_metadata_that_we_wrote(installed: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("setuptools and pip are not installed here")
    source, target = tmp_path / "source", tmp_path / "site"
    shutil.copytree(PACKAGE, source)  # a build leaves files beside the source
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    (metadata,) = target.glob("shapes_plugin-*.dist-info/entry_points.txt")
    ours = installed / "shapes_plugin-1.0.dist-info" / "entry_points.txt"
    assert metadata.read_text().split() == ours.read_text().split()


def test_a_part_takes_at_most_three_files_to_add() -> None:
    """The page names them: those of the project, and the package's own `pyproject.toml`."""
    root = PACKAGE.parent.parent.parent
    table = (root / "docs" / "plugins.md").read_text().partition("## What to read")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith(("| a ", "| an ", "| other "))]
    assert len(rows) == 6
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row)
        assert 1 <= len(files) <= 2
        for file in files:
            assert (root / file).is_file(), row
