"""Our own form: safetensors whose metadata holds the sizes, so that a file loads by itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from clip_base import config as configs
from clip_base.checkpoint import load_exactly, read_weights, write_weights
from clip_base.errors import InputError
from clip_base.files import existing
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig

FORMAT = "clip_base.clip/1"


def save_clip(model: CLIP, path: str | Path) -> None:
    """Writes a CLIP with its sizes, atomically."""
    sizes = json.dumps(dataclasses.asdict(model.config))
    write_weights(path, model.state_dict(), {"format": FORMAT, "config": sizes})


def load_clip(path: str | Path) -> CLIP:
    """Reads a CLIP that `save_clip` wrote, in evaluation mode.

    Raises:
        InputError: the file is missing, damaged, of another form, or its tensors do not fit its sizes.
    """
    weights, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} holds {metadata.get('format', 'unnamed weights')!r}, expected {FORMAT!r}")
    model = CLIP(configs.check(CLIPConfig, json.loads(metadata["config"]), f"sizes in {path}"))
    load_exactly(model, weights, path)
    return model.eval().to(memory_format=torch.channels_last)


def file_hash(path: str | Path) -> str:
    """Returns the sha256 of a file, in hex."""
    with existing(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(metadata: dict[str, str]) -> dict[str, Any]:
    """Returns a file's metadata with its JSON values read."""
    return {key: json.loads(value) if value[:1] in "{[" else value for key, value in metadata.items()}
