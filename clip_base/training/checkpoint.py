"""Training checkpoints: one folder per step, complete or absent.

`checkpoints/00000500/model.safetensors` has the task's weights, `training.pt` next to it the optimizer, the
random states and everything else that the loop needs to resume bit for bit. The folder is written under a
hidden name and renamed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_base.runtime.errors import InputError, shortened
from clip_base.storage.files import make_folder, naming_full_disk

KEPT = 2


def save(folder: Path, step: int, weights: dict[str, Tensor], training: dict[str, Any]) -> None:
    """Writes the checkpoint of `step` and removes all but the newest two."""
    make_folder(folder)
    target, temporary = folder / f"{step:08d}", folder / f".{step:08d}.tmp"
    sweep(folder)
    temporary.mkdir()
    try:
        with naming_full_disk(temporary, SafetensorError, RuntimeError):
            whole = {key: value.detach().contiguous() for key, value in weights.items()}
            save_file(whole, temporary / "model.safetensors")
            torch.save(training, temporary / "training.pt")
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in steps(folder)[:-KEPT]:
        shutil.rmtree(folder / f"{old:08d}")


def sweep(folder: Path) -> None:
    """Deletes what a killed process was writing; for the one process that writes there."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in `folder`, ascending."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def newest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """Returns (step, weights, training state) of the newest checkpoint, or None when there is none.

    Raises:
        InputError: the newest checkpoint is damaged; the message says from where the run can resume.
    """
    known = steps(folder)
    if not known:
        return None
    path = folder / f"{known[-1]:08d}"
    try:
        weights = load_file(path / "model.safetensors")
        training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the libraries raise of a damaged file
        reason = shortened(next(iter(str(error).splitlines()), type(error).__name__), 200)
        onward = f"step {known[-2]}" if len(known) > 1 else "the beginning"
        raise InputError(
            f"checkpoint {path} is damaged ({reason}); delete that folder and give the same command again "
            f"to resume from {onward}"
        ) from None
    return known[-1], weights, training
