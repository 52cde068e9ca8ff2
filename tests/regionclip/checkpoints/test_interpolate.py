"""Weights between two models: endpoints are the models themselves, what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip_base.models.clip import CLIP
from clip_base.runtime.errors import InputError
from clip_base.weights.load import load_clip
from clip_base.weights.native import read_weights, save_clip
from regionclip.checkpoints.interpolate import InterpolateConfig, mix
from regionclip.checkpoints.load import read_detector_file, save_detector
from regionclip.models.detector import Detector

Command = Callable[..., tuple[int, str]]


def trained(make_detector: Callable[..., Detector], path: Path, base: str = "cup") -> Path:
    """A detector whose tower, box head and background differ from the fixtures'."""
    detector = make_detector()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            if value.is_floating_point() and not name.startswith("network."):
                value += 0.1 * torch.randn(value.shape, generator=generator)
    save_detector(detector, path, [base])
    return path


def tensors(path: Path) -> dict[str, Tensor]:
    return read_weights(path)[0]


def test_a_curve_begins_and_ends_with_the_models_themselves(
    make_clip: Callable[..., CLIP], clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    other = tmp_path / "other.safetensors"
    save_clip(make_clip(seed=3), other)
    code, told = regionclip(
        "interpolate",
        f"first={clip_file}",
        f"second={other}",
        "alpha=[0,0.25,1]",
        f"out={tmp_path / 'curve'}",
    )
    assert (code, told) == (0, "")
    a, b = tensors(clip_file), tensors(other)
    curve = {
        alpha: tensors(tmp_path / "curve" / f"alpha-{alpha}.safetensors") for alpha in ("0", "0.25", "1")
    }
    moved = [name for name in a if a[name].is_floating_point() and not torch.equal(a[name], b[name])]
    assert moved
    for name in a:
        assert torch.equal(curve["0"][name], a[name])
        assert torch.equal(curve["1"][name], b[name])
    for name in moved:
        torch.testing.assert_close(curve["0.25"][name], 0.75 * a[name] + 0.25 * b[name])
    load_clip(str(tmp_path / "curve" / "alpha-0.25.safetensors"))


def test_a_clip_and_a_detector_give_a_detector_whose_clip_lies_between(
    make_detector: Callable[..., Detector], clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    file = trained(make_detector, tmp_path / "detector.safetensors")
    out = tmp_path / "mixed.safetensors"
    assert regionclip("interpolate", f"first={clip_file}", f"second={file}", f"out={out}")[0] == 0
    clip, detector, mixed = tensors(clip_file), tensors(file), tensors(out)
    assert mixed.keys() == detector.keys()
    for name, value in detector.items():
        if not name.startswith("clip."):
            assert torch.equal(mixed[name], value), name
        elif value.is_floating_point():
            torch.testing.assert_close(mixed[name], (clip[name.removeprefix("clip.")] + value) / 2)
    assert read_detector_file(out)[1] == ("cup",)


def test_the_clip_of_a_detector_can_be_written_alone(
    make_detector: Callable[..., Detector], clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    file, out = trained(make_detector, tmp_path / "detector.safetensors"), tmp_path / "clip.safetensors"
    options = [f"first={clip_file}", f"second={file}", "alpha=[1]", "part=clip", f"out={out}"]
    assert regionclip("interpolate", *options)[0] == 0
    detector, alone = tensors(file), load_clip(str(out)).state_dict()
    assert all(torch.equal(value, detector[f"clip.{name}"]) for name, value in alone.items())


def test_two_detectors_give_a_detector_with_the_seconds_base_names(
    make_detector: Callable[..., Detector], detector_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    file = trained(make_detector, tmp_path / "detector.safetensors", "star")
    out = tmp_path / "mixed.safetensors"
    assert regionclip("interpolate", f"first={detector_file}", f"second={file}", f"out={out}")[0] == 0
    a, b, mixed = tensors(detector_file), tensors(file), tensors(out)
    torch.testing.assert_close(mixed["box_head.weight"], (a["box_head.weight"] + b["box_head.weight"]) / 2)
    assert read_detector_file(out)[1] == ("star",)


def test_counts_are_rounded_and_numbers_keep_their_type() -> None:
    assert mix(torch.tensor(3), torch.tensor(8), 0.5).tolist() == 6
    assert mix(torch.tensor(1.0), torch.tensor(2.0, dtype=torch.float16), 0.5).dtype == torch.float16


def test_models_of_other_sizes_are_refused(
    make_clip: Callable[..., CLIP], clip_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    other = tmp_path / "other.safetensors"
    save_clip(make_clip(embed_dim=48), other)
    out = tmp_path / "mixed.safetensors"
    code, told = regionclip("interpolate", f"first={clip_file}", f"second={other}", f"out={out}")
    assert code == 2
    assert "CLIPs of different sizes" in told
    assert not out.exists()


def test_detectors_of_other_design_are_refused(
    detector_file: Path, tmp_path: Path, make_detector: Callable[..., Detector], regionclip: Command
) -> None:
    small = make_detector()
    other = Detector.untrained(small.clip, small.config, small.network, boxes="map")
    save_detector(other, tmp_path / "map.safetensors", [])
    code, told = regionclip(
        "interpolate",
        f"first={detector_file}",
        f"second={tmp_path / 'map.safetensors'}",
        f"out={tmp_path / 'mixed.safetensors'}",
    )
    assert code == 2
    assert "box_head.bias is in one only" in told


def test_an_input_is_not_written_over(clip_file: Path, detector_file: Path, regionclip: Command) -> None:
    code, told = regionclip(
        "interpolate", f"first={clip_file}", f"second={detector_file}", f"out={clip_file}"
    )
    assert code == 2
    assert "would overwrite" in told


def test_alphas_outside_their_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"numbers in \[0, 1\], found \[0\.5, 1\.2\]"):
        InterpolateConfig("a", "b", alpha=[0.5, 1.2], out="curve")
    with pytest.raises(InputError, match=r"numbers in \[0, 1\], found \[\]"):
        InterpolateConfig("a", "b", alpha=[], out="curve")
    with pytest.raises(InputError, match=r"weights are written as \.safetensors"):
        InterpolateConfig("a", "b", alpha=[0.5], out="curve")
