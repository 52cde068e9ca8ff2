"""Training checkpoints: a folder a step, whole or absent.

`checkpoints/00000500/model.safetensors` holds the task's weights, `training.pt` beside it the optimiser, the
random states and what else the loop needs to go on bit for bit. The folder is written under a hidden name and
renamed.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_base import distributed
from clip_base.errors import InputError
from clip_base.files import existing, naming_full_disk, replacing

KEPT = 2


def save(folder: Path, step: int, weights: dict[str, Tensor], training: dict[str, Any]) -> None:
    """Writes the checkpoint of `step` and removes all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"{step:08d}", folder / f".{step:08d}.tmp"
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)
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


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in `folder`, ascending."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def newest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """Returns (step, weights, training state) of the newest checkpoint, or None when there is none.

    Raises:
        InputError: the newest checkpoint is damaged; the message says from where the run can go on.
    """
    known = steps(folder)
    if not known:
        return None
    path = folder / f"{known[-1]:08d}"
    try:
        weights = load_file(path / "model.safetensors")
        training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        onward = f"step {known[-2]}" if len(known) > 1 else "the beginning"
        raise InputError(
            f"checkpoint {path} is damaged ({reason}); delete that folder and give the same command again "
            f"to go on from {onward}"
        ) from None
    return known[-1], weights, training


def write_weights(path: str | Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes weights as safetensors, atomically. Shared storage is copied, so every tensor stands alone.

    Several processes must all call it; the first writes.
    """
    path, whole = Path(path), distributed.full(weights)
    if not distributed.is_first():
        return
    with replacing(path) as temporary, naming_full_disk(path, SafetensorError):
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in whole.items()}, temporary, metadata)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file; returns its tensors and its metadata.

    Raises:
        InputError: the file is missing, cut off or no safetensors file.
    """
    path = existing(path, "weights file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"weights file {path} cannot be read ({reason}); it was cut off or is no safetensors file: "
            "copy it again"
        ) from None


def not_finite(weights: Mapping[str, Tensor]) -> str:
    """Returns which tensors hold NaN or infinity, in words; "" when none does."""
    bad = [
        f"{name} ({int((~value.isfinite()).sum()):,} of {value.numel():,} numbers)"
        for name, value in weights.items()
        # A sum is finite only when all its terms are, and takes a fraction of the time of looking at each.
        if value.is_floating_point() and not value.sum(dtype=torch.float32).isfinite()
        if not bool(value.isfinite().all())
    ]
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    return f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:4])}{more}" if bad else ""


def require_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises an InputError that names the tensors which hold NaN or infinity."""
    bad = not_finite(weights)
    if bad:
        raise InputError(f"weights {source} cannot be used: {bad}; copy the file again, or train again")


def load_exactly(module: torch.nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Loads weights when every key and shape fits.

    Raises:
        InputError: keys are missing, left over or misshapen, or numbers are not finite; the first few of each
            are listed.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - weights.keys())
    extra = sorted(weights.keys() - own.keys())
    misshapen = [
        f"{key} {list(weights[key].shape)} for {list(own[key].shape)}"
        for key in sorted(own.keys() & weights.keys())
        if own[key].shape != weights[key].shape
    ]
    faults = []
    for what, keys in (("missing", missing), ("left over", extra), ("misshapen", misshapen)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            faults.append(f"{len(keys)} {what}: {', '.join(keys[:4])}{more}")
    if faults:
        raise InputError(f"weights {source} do not fit the model: {'; '.join(faults)}")
    require_finite(weights, source)
    module.load_state_dict({key: distributed.shard_like(weights[key], value) for key, value in own.items()})
