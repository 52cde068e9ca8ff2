"""Weights that do not load end an evaluation with their name, before anything is detected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clip_base.weights.native import read_weights, write_weights

Command = Callable[..., tuple[int, str]]


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
DAMAGE: dict[str, Change] = {
    "half is missing": lambda weights: dict(list(weights.items())[::2]),
    "all under other names": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "the vision tower is missing": lambda weights: {
        name: value for name, value in weights.items() if "layer" not in name
    },
    "all are of another size": lambda weights: {
        name: value[: len(value) // 2].clone() if value.ndim else value for name, value in weights.items()
    },
    "something is left over": lambda weights: {**weights, "head.weight": torch.zeros(3)},
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["detector", "clip", "rpn"])
def test_weights_that_do_not_load_end_the_evaluation_before_anything_is_detected(
    damage: str,
    kind: str,
    options: list[str],
    clip_file: Path,
    rpn_file: Path,
    detector_file: Path,
    regionclip: Command,
    tmp_path: Path,
) -> None:
    sound = {"detector": detector_file, "clip": clip_file, "rpn": rpn_file}
    weights, metadata = read_weights(sound[kind])
    damaged = tmp_path / "damaged.safetensors"
    write_weights(damaged, DAMAGE[damage](weights), metadata)
    files = {**sound, kind: damaged}
    given = [f"weights={files['detector']}"]
    if kind != "detector":
        given = [f"weights={files['clip']}", "proposer.name=rpn", f"proposer.weights={files['rpn']}"]
    code, told = regionclip("evaluate", *options, *given, f"out={tmp_path / 'out'}")
    assert code == 2, told
    assert "damaged.safetensors" in told
    assert not (tmp_path / "out" / "results.json").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()
