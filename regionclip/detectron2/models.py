"""Any detectron2 model from its config and weights, whole or an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn

from clip_base.errors import InputError
from regionclip.detectron2.config import add_regionclip_config


class StrictCheckpointer(DetectionCheckpointer):  # type: ignore[misc]
    """Remembers which of the model's weights a file did not have; detectron2 only logs them."""

    missing: tuple[str, ...] = ()

    def _load_model(self, checkpoint: Any) -> Any:
        found = super()._load_model(checkpoint)
        self.missing = (*found.missing_keys, *(shape[0] for shape in found.incorrect_shapes))
        return found


def load(
    config: str, weights: str, overrides: Sequence[str], parts: Sequence[str], device: str | torch.device
) -> tuple[Any, str]:
    """Builds a model and loads its weights.

    Args:
        config: a YAML file, a LazyConfig (.py), or the name of one in detectron2's model zoo.
        weights: a file or an address; empty: what the config names.
        overrides: for a YAML key, value, key, value …; for a LazyConfig key=value ….
        parts: prefixes of the weights that must be in the file.
        device: where the model goes.

    Returns:
        The model in evaluation mode, and the order of the channels that it wants ("RGB" or "BGR").

    Raises:
        InputError: no such config, weights that are missing or do not fit, a model without such parts.
    """
    path = _config_file(config)
    if path.endswith(".py"):
        cfg = LazyConfig.apply_overrides(LazyConfig.load(path), list(overrides))
        model, source = instantiate(cfg.model), weights or cfg.get("train", {}).get("init_checkpoint", "")
        channels = str(cfg.model.get("input_format", "BGR"))
    else:
        cfg = get_cfg()
        add_regionclip_config(cfg)
        cfg.merge_from_file(path)
        cfg.merge_from_list(list(overrides))
        cfg.MODEL.DEVICE = str(device)
        model, source, channels = build_model(cfg), weights or cfg.MODEL.WEIGHTS, str(cfg.INPUT.FORMAT)
    _load_weights(model, source, parts, config)
    return model.to(device).eval().requires_grad_(False), channels


def _config_file(config: str) -> str:
    if Path(config).is_file():
        return config
    try:
        return str(model_zoo.get_config_file(config))
    except RuntimeError:
        raise InputError(f"{config} is neither a file nor a config in detectron2's model zoo") from None


def _load_weights(model: nn.Module, source: str, parts: Sequence[str], config: str) -> None:
    held = set(model.state_dict())
    absent = [part for part in parts if not any(key.startswith(part) for key in held)]
    if absent:
        raise InputError(f"the model of {config} has no {absent[0]}; give one with a region proposal network")
    if not source:
        raise InputError(f"{config} names no weights; give them with weights=")
    checkpointer = StrictCheckpointer(model)
    try:
        checkpointer.load(source)
    except (AssertionError, OSError, RuntimeError) as error:
        raise InputError(f"weights {source} cannot be read: {str(error).splitlines()[0]}") from None
    missing = [key for key in checkpointer.missing if key.startswith(tuple(parts))]
    if missing:
        raise InputError(
            f"weights {source} lack {len(missing)} of the tensors that {config} proposes with, "
            f"first {missing[0]}; are they of another model?"
        )
