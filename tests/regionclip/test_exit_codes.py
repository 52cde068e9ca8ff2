"""A job that did nothing, or skipped more images than max_skipped allows, ends with exit code 1 and one line.

Covered: mine, features, detect, evaluate, propose, train-rpn, train-detector, pretrain, export, concepts;
of clip_base zeroshot, retrieval, linear-probe and pretrain (`tests/clip_base/jobs/test_skipped.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_base.jobs.cli import main
from clip_base.storage.files import read_json

Run = Callable[..., str]
Jobs = dict[str, list[str]]


@pytest.fixture
def images(world: Path, tmp_path: Path) -> Path:
    """The world's images, to damage."""
    shutil.copytree(world / "images", tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def jobs(world: Path, images: Path, clip_file: Path, detector_file: Path, mining_options: list[str]) -> Jobs:
    """Jobs that read the training images of the world; `out` is left to give."""
    mined = [option for option in mining_options if not option.startswith("images=")]
    annotated = [f"annotations={world / 'instances_train.json'}", f"images={images}"]
    small = ["resize.short=[64]", "resize.long=64", "batch_size=4"]
    grid = ["proposer.name=grid", "proposer.sizes=[1.0]"]
    classes = [f"annotations={world / 'instances_train.json'}", "templates=simple", "batch_size=4"]
    return {
        "region-mine": [*mined, f"images={images}"],
        "region-features": [str(images / "train"), f"weights={detector_file}", "batch_size=4"],
        "region-detect": [
            str(images / "train"),
            f"weights={detector_file}",
            "vocabulary=cup, star",
            "draw=false",
        ],
        "region-evaluate": [*annotated, f"weights={detector_file}", "boxes=truth", "report=false"],
        "region-propose": [*annotated, *grid, *small],
        "zeroshot": [*classes, f"images={images}", f"weights={clip_file}"],
        "retrieval": [
            f"captions={world / 'captions_train.json'}",
            f"images={images}",
            f"weights={clip_file}",
        ],
    }


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a job that ends with exit code 1, and returns its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        begun = ("note: ", "embedding ", "mining ")  # what a job says before it fails
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(begun)]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert "Error" not in lines[0]
        return lines[0]

    return run


NAMES = [
    "region-mine",
    "region-features",
    "region-detect",
    "region-evaluate",
    "region-propose",
    "zeroshot",
    "retrieval",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_that_can_use_a_few_of_its_images_fails_unless_that_is_allowed(
    name: str, jobs: Jobs, images: Path, fails: Run, tmp_path: Path
) -> None:
    for file in sorted((images / "train").iterdir())[2:]:
        file.write_bytes(b"no image")
    told = fails(name, *jobs[name], f"out={tmp_path / 'out'}")
    assert "cannot be used, more than max_skipped=" in told
    assert "skipped.jsonl" in told
    assert (tmp_path / "out" / "skipped.jsonl").read_text().count("\n") >= 10
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert main([name, *jobs[name], f"out={tmp_path / 'out'}", "max_skipped=1"]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_one_bad_image_is_one_counted_skip(name: str, jobs: Jobs, images: Path, tmp_path: Path) -> None:
    sorted((images / "train").iterdir())[0].write_bytes(b"no image")
    assert main([name, *jobs[name], f"out={tmp_path / 'out'}", "max_skipped=0.5"]) == 0
    listed = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert "is of no known format" in listed
    for line in listed.splitlines():
        assert json.loads(line)["reason"]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_that_can_use_none_fails_whatever_is_allowed(
    name: str, jobs: Jobs, images: Path, fails: Run, tmp_path: Path
) -> None:
    for file in (images / "train").iterdir():
        file.write_bytes(b"no image")
    assert "cannot be used" in fails(name, *jobs[name], f"out={tmp_path / 'out'}", "max_skipped=1")


def test_mining_in_another_folder_is_an_error_before_anything_is_mined(
    jobs: Jobs, fails: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    options = [option for option in jobs["region-mine"] if not option.startswith("images=")]
    told = fails("region-mine", *options, f"images={tmp_path / 'empty'}", f"out={tmp_path / 'out'}")
    assert "holds none of the first 12 images" in told
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_mining_that_keeps_no_region_fails(jobs: Jobs, fails: Run, tmp_path: Path) -> None:
    given = [option for option in jobs["region-mine"] if not option.startswith("matcher.")]
    options = ["matcher.name=pool", "matcher.min_probability=1.0", "matcher.keep_all_if_none=false"]
    told = fails("region-mine", *given, *options, f"out={tmp_path / 'out'}")
    assert "no region was mined from 12 images" in told
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_export_of_no_box_fails_and_leaves_no_file(mined: Path, fails: Run, tmp_path: Path) -> None:
    out = tmp_path / "labels.json"
    told = fails("region-export", f"mined={mined}", "min_probability=1.0", "min_objectness=1.0", f"out={out}")
    assert "no box of" in told
    assert not out.exists()


def test_a_pool_of_no_concept_fails(fails: Run, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("and then\n")
    options = [f"captions={tmp_path / 'captions.txt'}", f"out={tmp_path / 'pool.jsonl'}"]
    assert "no noun phrase was found" in fails("region-concepts", *options)


@pytest.mark.parametrize("name", ["region-evaluate", "region-propose"])
def test_annotated_images_that_are_not_there_count_as_skipped(
    name: str, jobs: Jobs, images: Path, world: Path, fails: Run, tmp_path: Path
) -> None:
    assert len(read_json(world / "instances_train.json")["images"]) == 12
    for file in sorted((images / "train").iterdir())[:8]:
        file.unlink()
    assert "8 of 12 images cannot be used" in fails(name, *jobs[name], f"out={tmp_path / 'out'}")


@pytest.mark.parametrize("job", ["region-train-rpn", "region-train-detector"])
def test_training_on_unreadable_images_fails(
    job: str, world: Path, images: Path, rpn_file: Path, clip_file: Path, fails: Run, tmp_path: Path
) -> None:
    for file in (images / "train").iterdir():
        file.write_bytes(b"no image")
    given = {
        "region-train-rpn": [f"network.backbone_weights={clip_file}"],
        "region-train-detector": [f"weights={clip_file}", f"rpn={rpn_file}"],
    }
    annotated = [f"annotations={world / 'instances_train.json'}", f"images={images}"]
    options = [f"split={world / 'split.json'}", "train.steps=1", "train.batch_size=2"]
    told = fails(job, *annotated, *options, *given[job], f"out={tmp_path / 'out'}")
    assert "unusable" in told
