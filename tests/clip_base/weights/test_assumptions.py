"""What a weights file does not say and was assumed is told by everything that loads it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clip_base
from clip_base.jobs import cli
from clip_base.models.clip import CLIP, to_openai_names
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputNote
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A state dict of a CLIP with GELU, as open_clip's trainings leave one: nothing in it says so."""
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    model = CLIP(CLIPConfig(32, vision, TextConfig(64, 1, 1, 20), "gelu"))
    torch.save(to_openai_names(model.state_dict()), tmp_path / "bare.pt")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 40), (100 * number, 60, 60)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    return tmp_path / "bare.pt"


ASSUMED = r"bare\.pt: the file does not say which activation .* quick_gelu is assumed.*activation=gelu"


@pytest.mark.parametrize("load", [lambda path: clip_base.load(path, "cpu")[0], load_clip])
def test_loading_notes_the_assumed_activation_at_the_callers_line(bare: Path, load: Any) -> None:
    with pytest.warns(InputNote, match=ASSUMED) as caught:
        model = load(bare)
    assert model.config.activation == "quick_gelu"
    assert {Path(warning.filename).name for warning in caught} == {"test_assumptions.py"}


def test_an_activation_that_is_given_or_stored_needs_no_note(bare: Path, archive: Any, make: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*which activation", InputNote)
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about writing the archive
        model, _ = clip_base.load(bare, "cpu", activation="gelu")
        save_clip(model, bare.with_name("own.safetensors"))
        clip_base.load(bare.with_name("own.safetensors"), "cpu")
        clip_base.load(archive(make("resnet"), bare.with_name("openai.pt")), "cpu")


@pytest.mark.parametrize("job", ["zeroshot", "linear-probe"])
def test_commands_print_the_assumption_as_one_line(
    bare: Path, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = bare.parent / "images"
    data = [f"images={images}"] if job == "zeroshot" else [f"train={images}", f"test={images}"]
    arguments = [job, *data, f"weights={bare}", f"out={bare.parent / job}"]
    assert cli.main(arguments) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "quick_gelu is assumed" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"note: {bare}: the file does not say")
    assert cli.main([*arguments, "activation=gelu", f"out={bare.parent / 'said'}"]) == 0
    assert "quick_gelu" not in capsys.readouterr().err


def test_other_warnings_look_as_python_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.notes_as_lines(), pytest.warns(UserWarning, match="something else"):
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert "note:" not in capsys.readouterr().err
