"""Inputs that used to end with an exception's name end with one line that says what to do."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from clip_base.jobs.cli import main, main_regionclip
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import pick_device
from clip_base.weights.native import read_weights

Options = list[str]


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A pickle that is called what it is not."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    return path


def ends_in_one_line(arguments: Options, program: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert {"clip_base": main, "regionclip": main_regionclip}[program](arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert "Error" not in told
    assert len(told) < 400
    return told


def jobs(weights: Path, world: Path, out: Path) -> dict[str, tuple[str, Options]]:
    annotated = [f"annotations={world / 'instances_train.json'}", f"images={world / 'images'}"]
    images = str(world / "images" / "train")
    return {
        "inspect": ("clip_base", ["inspect", str(weights)]),
        "zeroshot": (
            "clip_base",
            ["zeroshot", f"weights={weights}", f"images={world / 'images'}", f"out={out}"],
        ),
        "detect": ("regionclip", ["detect", images, f"weights={weights}", "vocabulary=cup", f"out={out}"]),
        "evaluate": ("regionclip", ["evaluate", *annotated, f"weights={weights}", f"out={out}"]),
        "train-rpn": (
            "regionclip",
            [
                "train-rpn",
                *annotated,
                f"split={world / 'split.json'}",
                f"network.backbone_weights={weights}",
                f"out={out}",
            ],
        ),
    }


@pytest.mark.parametrize("job", ["inspect", "zeroshot", "detect", "evaluate", "train-rpn"])
def test_a_pickle_named_safetensors(
    job: str, pickled: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, arguments = jobs(pickled, world, tmp_path / "out")[job]
    assert "model.safetensors" in ends_in_one_line(arguments, program, capsys)


def test_tensors_in_a_pickle_named_safetensors_are_told_to_be_renamed(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"what torch.save writes: rename it to .pth"):
        read_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "vulkan", "cuda:99", "gpu"])
def test_a_device_that_is_not_here(device: str) -> None:
    if device in ("mps", "xpu") and getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    with pytest.raises(InputError, match=f"device={device}") as caught:
        pick_device(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[[1, 2, 3], [4, 5, 6]]", "[1]", '["a"]', "[null]", "7"])
def test_results_that_are_rows(
    content: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(content)
    given = [f"annotations={world / 'instances_val.json'}", f"results={tmp_path / 'rows.json'}"]
    told = ends_in_one_line(["evaluate", *given, f"out={tmp_path / 'out'}"], "regionclip", capsys)
    assert "rows.json" in told


@pytest.mark.parametrize("job", ["detect", "features", "evaluate"])
def test_an_out_that_is_a_file(
    job: str, world: Path, detector_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    given = {
        "detect": [str(world / "images" / "train"), f"weights={detector_file}", "vocabulary=cup"],
        "features": [str(world / "images" / "train"), f"weights={detector_file}"],
        "evaluate": [f"annotations={world / 'instances_val.json'}", f"results={tmp_path / 'none.json'}"],
    }
    told = ends_in_one_line([job, *given[job], f"out={tmp_path / 'out'}"], "regionclip", capsys)
    assert "is a file; give a folder" in told
    assert (tmp_path / "out").read_text() == "mine"
