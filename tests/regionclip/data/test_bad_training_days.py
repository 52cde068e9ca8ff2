"""Bad days of trainings: faults of the validation, losses and weights that are no numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_base.storage.files import read_json

Content = dict[str, Any]
Options = dict[str, object]
Command = Callable[[str, Options, Path], tuple[int, str, str]]
MakeOptions = Callable[..., Options]

TRAINING = ["train-rpn", "train-detector"]


def one_line(told: str) -> bool:
    return told.startswith("error: ") and told.count("\n") == 1


def test_a_broken_validation_picture_does_not_cost_the_training(
    content: Content, world: Path, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    images = shutil.copytree(world / "images", tmp_path / "images")
    entry = read_json(world / "instances_val.json")["images"][0]
    (images / entry["file_name"]).write_bytes(b"")
    options = options_for("train-rpn", content, images)
    options |= {"val_annotations": world / "instances_val.json"}
    code, printed, _ = call("train-rpn", options, tmp_path / "out")
    assert code == 0
    assert "validation: 4 images" in printed
    assert read_json(tmp_path / "out" / "metrics.json")["val_skipped"] == 1
    (line,) = (tmp_path / "out" / "val_skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["image_id"] == entry["id"]
    assert "it is empty" in line


def test_a_fault_of_the_validation_shows_before_the_first_step_and_is_fixed_in_the_same_folder(
    content: Content, world: Path, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    options = options_for("train-rpn", content)
    options |= {"val_annotations": world / "instances_val.json", "val_images": tmp_path}
    code, _, told = call("train-rpn", options, tmp_path / "out")
    assert code == 2
    assert "none of the 4 images" in told
    assert not (tmp_path / "out" / "log.jsonl").exists()
    options["val_images"] = ""
    assert call("train-rpn", options, tmp_path / "out")[0] == 0
    first = read_json(tmp_path / "out" / "metrics.json")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    # The finished folder is measured on other images, and keeps what it holds.
    options["val_annotations"] = world / "instances_train.json"
    assert call("train-rpn", options, tmp_path / "out")[0] == 0
    second = read_json(tmp_path / "out" / "metrics.json")
    assert second["measured_on"] != first["measured_on"]
    assert second["recall@100_base"] != first["recall@100_base"]
    assert second["steps"] == first["steps"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_without_a_split_all_annotated_categories_are_base(
    content: Content, world: Path, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    options = options_for("train-rpn", content) | {
        "split": "",
        "val_annotations": world / "instances_val.json",
    }
    code, printed, _ = call("train-rpn", options, tmp_path / "out")
    assert code == 0
    assert f"no split given: all {len(content['categories'])} annotated categories are base" in printed
    assert "recall@100_novel" not in read_json(tmp_path / "out" / "metrics.json")


def test_a_loss_that_is_not_a_number_stops_the_proposal_networks_training(
    content: Content, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    options = options_for("train-rpn", content)
    code, _, told = call("train-rpn", {**options, "box_weight": ".nan"}, tmp_path / "out")
    assert code == 2
    assert one_line(told), told
    assert "the loss is not finite at step 1" in told
    assert "box nan" in told
    assert len(read_json(tmp_path / "out" / "not_finite.json")["samples"]) == 2
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("job", TRAINING)
def test_weights_that_are_no_numbers_are_never_kept(
    content: Content, job: str, options_for: MakeOptions, call: Command, tmp_path: Path
) -> None:
    """The last step's loss is finite, what it makes of the weights is not."""
    options = options_for(job, content)
    options |= {"train.steps": 1, "train.lr": 1e39, "train.schedule": "constant", "train.warmup_steps": 0}
    code, _, told = call(job, options, tmp_path / "out")
    assert code == 2
    assert "are not finite after step 1; lower train.lr" in told
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("checkpoints/*/*"))
