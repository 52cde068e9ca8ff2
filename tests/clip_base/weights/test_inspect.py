from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clip_base.jobs import cli
from clip_base.jobs import config as configs
from clip_base.models.clip import CLIP, to_openai_names
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError
from clip_base.storage.hashing import file_hash
from clip_base.weights.fetching import download
from clip_base.weights.inspect import InspectConfig, inspect
from clip_base.weights.load import load_clip
from clip_base.weights.native import save_clip


@pytest.fixture(scope="module")
def model() -> CLIP:
    vision = VisionConfig(kind="resnet", layers=[1, 2, 1, 1], width=8, resolution=64)
    return CLIP(
        CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=2, context_length=12, vocab_size=600))
    )


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    inspect(InspectConfig(file=str(path)))
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_whole_file_shows_form_towers_parameters_and_precision(
    model: CLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_clip(model, tmp_path / "w.safetensors")
    text = shown(tmp_path / "w.safetensors", capsys)
    count = sum(parameter.numel() for parameter in model.parameters())
    for part in (
        "clip_base",
        "ResNet, blocks 1-2-1-1",
        "64 pixels",
        "12 positions",
        f"{count:,} in",
        "float32:",
    ):
        assert part in text
    assert "none of the published models" in text
    assert "yes: every tensor" in text


def test_what_a_file_does_not_say_is_noted(model: CLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"state_dict": to_openai_names(model.state_dict())}, tmp_path / "w.pt")
    text = shown(tmp_path / "w.pt", capsys)
    assert "training checkpoint" in text
    assert "quick_gelu is assumed" in text


def test_a_published_file_is_known_by_its_checksum(
    model: CLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "w.safetensors"
    save_clip(model, path)
    monkeypatch.setitem(download.FILES, "RN50", download.Published("http://x/RN50.pt", file_hash(path)))
    assert "OpenAI's RN50, sha256 equal" in shown(path, capsys)


def test_other_packages_files_are_listed_by_their_metadata(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    metadata = {
        "format": "regionclip.detector/1",
        "clip": json.dumps({"embed_dim": 32, "vision": {"kind": "resnet"}}),
        "base": json.dumps([f"class {number}" for number in range(40)]),
    }
    weights = {"clip.a": torch.ones(3, 4), "network.b": torch.ones(5, dtype=torch.float16)}
    save_file(weights, tmp_path / "d.safetensors", metadata)
    text = shown(tmp_path / "d.safetensors", capsys)
    for part in ("regionclip.detector/1", "embed_dim: 32", "kind: resnet", "(40 in all)", "17 in 2 tensors"):
        assert part in text
    assert "clip: 12, network: 5" in text


def test_unknown_and_broken_files_fail(model: CLIP, tmp_path: Path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="not a complete CLIP"):
        inspect(InspectConfig(file=str(tmp_path / "a.safetensors")))
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors", {"format": "other/1", "config": "{"})
    with pytest.raises(InputError, match="not valid JSON"):
        inspect(InspectConfig(file=str(tmp_path / "b.safetensors")))
    save_clip(model, tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        inspect(InspectConfig(file=str(tmp_path / "c.safetensors")))


def test_the_command_takes_the_file_as_a_plain_argument(tmp_path: Path):
    file, overrides = cli.parse(InspectConfig, [str(tmp_path / "w.safetensors")])
    assert file is None
    assert configs.resolve(InspectConfig, None, overrides).file == str(tmp_path / "w.safetensors")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(
    model: CLIP, tmp_path: Path, number: float, capsys: pytest.CaptureFixture[str]
):
    broken = {name: value.clone() for name, value in model.state_dict().items()}
    broken["text.text_projection"][0, :3] = number
    for name, state, metadata in (
        ("state.safetensors", to_openai_names(broken), {"format": "pt"}),
        ("detector.safetensors", broken, {"format": "regionclip.detector/1"}),
    ):
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / name, metadata)
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        message = capsys.readouterr().err
        assert f"{name} cannot be used: 1 tensors hold NaN or infinity" in message
        assert "text_projection (3 of 2,048 numbers)" in message
    with pytest.raises(InputError, match=r"text\.text_projection"):
        load_clip(tmp_path / "state.safetensors")


def test_weights_far_from_zero_are_finite(model: CLIP, tmp_path: Path):
    large = {name: value.clone() for name, value in model.state_dict().items()}
    large["text.text_projection"][0, :3] = 3e38  # their sum is no float32
    save_file({key: value.contiguous() for key, value in large.items()}, tmp_path / "w.safetensors")
    assert float(load_clip(tmp_path / "w.safetensors").text.text_projection.detach().max()) > 2e38


def test_a_projection_of_zeros_is_noted(model: CLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    empty = {name: value.clone() for name, value in model.state_dict().items()}
    empty["text.text_projection"].zero_()
    save_file({key: value.contiguous() for key, value in empty.items()}, tmp_path / "w.safetensors")
    assert "1 matrices hold zeros alone, such as text.text_projection" in shown(
        tmp_path / "w.safetensors", capsys
    )
