"""Jobs on annotations that a test has changed: their options, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.jobs.cli import main_regionclip
from clip_base.storage.files import read_json, write_json

Content = dict[str, Any]
Options = dict[str, object]
Command = Callable[[str, Options, Path], tuple[int, str, str]]
MakeOptions = Callable[..., Options]

SMALL: Options = {"resize.short": "[64]", "resize.long": 64}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a job: exit code, what it printed, what it told on stderr."""

    def run(job: str, options: Options, out: Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main_regionclip([job, *(f"{key}={value}" for key, value in options.items()), f"out={out}"])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def options_for(
    world: Path, clip_file: Path, rpn_file: Path, detector_file: Path, tmp_path: Path
) -> MakeOptions:
    """Makes options with which a job runs on these annotations: options_for(job, content, images)."""

    def make(job: str, content: Content, images: Path = world / "images") -> Options:
        annotations = tmp_path / "given.json"
        write_json(annotations, content)
        annotated: Options = {"annotations": annotations, "images": images, **SMALL}
        # Twelve samples: each image of an epoch comes up.
        training = {
            **annotated,
            "split": world / "split.json",
            "train.steps": 6,
            "train.batch_size": 2,
            "train.lr": 0.001,
        }
        rois = {"max_proposals": 20, "rois_per_image": 8}
        detector: Options = {"weights": detector_file, "use_checkpoint_config": "false", "precision": "fp32"}
        found: dict[str, Options] = {
            "train-rpn": {**training, "network.channels": 16, "network.backbone_weights": clip_file},
            "train-detector": {**training, "weights": clip_file, "rpn": rpn_file, **rois},
            "propose": {**annotated, "proposer.name": "rpn", "proposer.weights": rpn_file},
            "evaluate": {**annotated, **detector, "report": "false"},
            "features": {**annotated, **detector, "regions_from": "truth"},
            "detect": {**SMALL, **detector, "images": f"[{images / 'train'}]", "vocabulary": "cup, star"},
        }
        return found[job]

    return make


@pytest.fixture
def content(world: Path) -> Content:
    """The training annotations."""
    return dict(read_json(world / "instances_train.json"))
